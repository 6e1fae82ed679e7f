"""What the first run on a GPU asks of the kernels besides the tests: one process per question.

    python -m fasttransformer.benchmarks.gpu_probes NAME [--device cuda] [--backend cuda]
    python -m fasttransformer.benchmarks.gpu_probes --list

A probe goes where a kernel on a device may fail although its source passes in simt: launches at the
edges of shared memory, CUDA graphs, streams and threads, very many sequences, rows more than 2³¹
elements apart, empty grids. Each prints one JSON line:

    {"probe": …, "status": "ok" | "finding" | "skipped", "checks": how many, "worst": …,
     "notes": […], "seconds": …}

``worst`` is the largest error as a fraction of what the number contract allows. Every probe also
runs on the CPU (``--device cpu``), where what only a GPU has is replaced by a plain call; a note
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer._contract import (
    DRAWS,
    Comparison,
    compare_runs,
    fairly,
    outputs_and_gradients,
    runnable,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Rows that just fit into 48 KB of shared memory (what a block gets unless it asks for more) and
#: into Hopper's 227 KB, in bytes; a row may take all of it or leave a little to the reductions.
SHARED_EDGES = (48 << 10, 227 << 10)

Call = Callable[..., Any]


class Card:
    """The device of a probe, and what the probe found there."""

    def __init__(self, device: str, backend: str) -> None:
        self.device, self.backend = device, backend
        self.checks, self.worst = 0, 0.0
        self.findings: list[str] = []
        self.notes: list[str] = []

    @property
    def real(self) -> bool:
        return self.device != "cpu"

    def some(self, items: Iterable[Any]) -> list[Any]:
        """All of a list on a GPU; its first and last on the CPU, which would take a minute."""
        listed = list(items)
        return listed if self.real else [listed[0], listed[-1]]

    def stand_in(self, what: str) -> None:
        self.notes.append(f"{what}: a plain call stands in for it on the CPU")

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def claim(self, label: str, right: bool, problem: str = "differs") -> None:
        self.checks += 1
        if not right:
            self.findings.append(f"{label}: {problem}")

    def equal(self, label: str, got: Any, want: Any) -> None:
        """Bit for bit."""
        pairs = list(zip(tuples(got), tuples(want), strict=True))
        same = all(torch.equal(a, b) for a, b in pairs)
        most = max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
        self.claim(label, same, f"differs by up to {most:.3g}")

    def hold(self, label: str, call: Call, *inputs: Tensor, grads: bool = True) -> None:
        """Outputs and gradients of ``call(ops, *inputs)`` to the number contract.

        The reference runs on the same device, in float64 and in the inputs' dtype.
        """

        def compared(tensors: tuple[Tensor, ...]) -> dict[str, Comparison]:
            def of(ops: Any) -> Call:
                return lambda *t: call(ops, *t)

            on: dict[str, Any] = {"device": self.device, "grads": grads}
            exact = outputs_and_gradients(of(reference), tensors, dtype=torch.float64, **on)
            peer = outputs_and_gradients(of(reference), tensors, **on)
            with ft.use_backend(self.backend):
                got = outputs_and_gradients(of(ft), tensors, **on)
            return compare_runs(got, exact, peer)

        def again() -> dict[str, Comparison]:
            return compared(tuple(drawn_like(x) for x in inputs))

        try:
            found = fairly(compared(inputs), again, DRAWS)
        except torch.OutOfMemoryError as error:
            self.notes.append(f"{label}: {str(error).splitlines()[0]}")
            return
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self.claim(label, False, f"{type(error).__name__}: {error}"[:300])
            return
        for name, comparison in found.items():
            self.claim(f"{label}, {name}", comparison.problem is None, comparison.problem or "")
            if comparison.allowed:
                self.worst = max(self.worst, comparison.error / comparison.allowed)


def drawn_like(x: Tensor) -> Tensor:
    return torch.randn_like(x) if x.is_floating_point() else x


def tuples(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if t is not None]


def gradients(call: Call, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of a fixed weighting of it."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = tuples(call(*leaves))[0]
    weight = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, weight.expand_as(out))]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- shapes -------------------------------------------------------------------------------------


def attention_mask_128(card: Card) -> None:
    """Head size 128 with a mask, a bias, both: the general kernel, forward and backward."""
    queries, keys = (300, 517) if card.real else (60, 130)
    for dtype in card.some(DTYPES):
        q = card.randn(2, 4, queries, 128, dtype=dtype)
        k, v = (card.randn(2, 2, keys, 128, dtype=dtype) for _ in "kv")
        mask = torch.rand(queries, keys, device=card.device) < 0.7
        mask[5] = False
        bias = card.randn(4, queries, keys, dtype=dtype)
        name = f"D 128 {short(dtype)}"
        card.hold(f"{name} mask", lambda ops, q, k, v, m=mask: ops.attention(q, k, v, mask=m),
                  q, k, v)  # fmt: skip
        card.hold(f"{name} bias", lambda ops, q, k, v, b: ops.attention(q, k, v, bias=b),
                  q, k, v, bias)  # fmt: skip
        card.hold(
            f"{name} mask, causal, window, softcap",
            lambda ops, q, k, v, m=mask: ops.attention(
                q, k, v, mask=m, is_causal=True, window=(100, 0), softcap=20.0
            ),
            q, k, v,
        )  # fmt: skip


def attention_head_sizes(card: Card) -> None:
    """Each bucket of head sizes, its edges and lengths around a tile's, causal and not."""
    for dtype in card.some(DTYPES[::2]):
        for head_dim in card.some((8, 32, 40, 64, 72, 128, 136, 192, 256)):
            for length in (127, 257):
                q, k, v = (card.randn(1, 2, length, head_dim, dtype=dtype) for _ in "qkv")
                for causal in (False, True):
                    card.hold(
                        f"D {head_dim} S {length} {short(dtype)}" + " causal" * causal,
                        lambda ops, q, k, v, c=causal: ops.attention(q, k, v, is_causal=c),
                        q, k, v,
                    )  # fmt: skip


def widths(dtype: torch.dtype, arrays: int) -> list[int]:
    """Columns around the edges of shared memory, where a row is kept there ``arrays`` times."""
    found = []
    for edge in SHARED_EDGES:
        columns = edge // (arrays * dtype.itemsize)
        # A row's last 56 columns 16-bit are where 48 KB less the reductions' scratch end; 512
        # columns below lies the limit that keeps 1 KB for them.
        found += [columns + d for d in (-1032, -512, -56, -48, -40, -8, -1, 0, 1, 8)]
    return found


def softmax_columns(card: Card) -> None:
    """softmax and its backward pass where a row just fits into shared memory, and just doesn't."""
    for dtype in card.some(DTYPES):
        for columns in card.some(sorted({*widths(dtype, 1), *widths(dtype, 2)})):
            x = card.randn(3, columns, dtype=dtype)
            card.hold(f"{columns} {short(dtype)}", lambda ops, x: ops.softmax(x), x)


def cross_entropy_columns(card: Card) -> None:
    """cross entropy at the same widths."""
    for dtype in card.some(DTYPES):
        for columns in card.some(widths(dtype, 1)):
            x = card.randn(3, columns, dtype=dtype)
            target = torch.tensor([0, columns // 2, columns - 1], device=card.device)
            card.hold(
                f"{columns} {short(dtype)}",
                lambda ops, x, t=target: ops.cross_entropy(x, t, reduction="none"),
                x,
            )


def norm_columns(card: Card) -> None:
    """The norms forward and backward where one or two arrays of a row just fit."""
    for dtype in card.some(DTYPES):
        for columns in card.some(sorted({*widths(dtype, 1), *widths(dtype, 2)})):
            x, y = (card.randn(3, columns, dtype=dtype) for _ in "xy")
            w, b = (card.randn(columns, dtype=dtype) for _ in "wb")
            name = f"{columns} {short(dtype)}"
            card.hold(
                f"layer_norm {name}",
                lambda ops, x, w, b: ops.layer_norm(x, x.shape[-1:], w, b),
                x, w, b,
            )  # fmt: skip
            card.hold(
                f"add_rms_norm {name}",
                lambda ops, x, y, w: ops.add_rms_norm(x, y, x.shape[-1:], w, eps=1e-6),
                x, y, w,
            )  # fmt: skip


def linear_tiles(card: Card) -> None:
    """Products whose three sizes lie at, below and above a tile's, and depths that leave a rest."""
    sizes = ((1, 32, 16), (15, 40, 512), (16, 33, 520), (64, 64, 128), (65, 128, 136),
             (127, 129, 64), (128, 128, 72), (129, 256, 200), (257, 384, 1032))  # fmt: skip
    for dtype in card.some(DTYPES):
        for rows, columns, depth in card.some(sizes):
            x, w = card.randn(rows, depth, dtype=dtype), card.randn(columns, depth, dtype=dtype)
            b, r = card.randn(columns, dtype=dtype), card.randn(rows, columns, dtype=dtype)
            name = f"{rows}×{columns}×{depth} {short(dtype)}"
            card.hold(f"linear_add {name}", lambda ops, *t: ops.linear_add(*t), x, w, b, r)
            card.hold(
                f"linear_add_layer_norm {name}",
                lambda ops, x, w, b, r, g: ops.linear_add_layer_norm(x, w, b, r, g, g),
                x, w, b, r, b + 1,
            )  # fmt: skip


def attention_varlen_100000(card: Card) -> None:
    """100,000 sequences of 1 to 4 tokens: more than a grid's second and third dimension holds."""
    count, heads, head_dim = 100_000 if card.real else 5_000, 2, 16
    lengths = 1 + torch.arange(count, device=card.device) % 4
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    there = torch.arange(4, device=card.device) < lengths[:, None]
    q, k, v = (card.randn(int(lengths.sum()), heads, head_dim, dtype=torch.float16) for _ in "qkv")

    def packed(*inputs: Tensor) -> Tensor:
        longest = {"max_seqlen_q": 4, "max_seqlen_k": 4}
        return ft.attention_varlen(*inputs, bounds, bounds, **longest, backend=card.backend)

    def padded(*inputs: Tensor) -> Tensor:
        wide = []
        for x in inputs:
            place = x.new_zeros(count, 4, heads, head_dim)
            wide.append(place.masked_scatter(there[..., None, None], x).transpose(1, 2))
        out = reference.attention(*wide, mask=there[:, None, None])
        return out.transpose(1, 2)[there]

    got = outputs_and_gradients(packed, [q, k, v], device=card.device)
    exact = outputs_and_gradients(padded, [q, k, v], dtype=torch.float64, device=card.device)
    peer = outputs_and_gradients(padded, [q, k, v], device=card.device)
    for name, found in compare_runs(got, exact, peer).items():
        card.claim(name, found.problem is None, found.problem or "")
        if found.allowed:
            card.worst = max(card.worst, found.error / found.allowed)


def empty(card: Card) -> None:
    """Nothing to do is no launch with an empty grid, which CUDA refuses."""
    for rows in (0, 2):
        x, w = card.randn(rows, 8), card.randn(8)
        for name, call in operations_on_rows().items():
            card.hold(f"{name} of {rows} rows", call, x, w)
    for batch, queries, keys in ((0, 5, 5), (1, 0, 5), (1, 5, 0)):
        q = card.randn(batch, 2, queries, 64)
        k, v = (card.randn(batch, 2, keys, 64) for _ in "kv")
        card.hold(f"attention {batch}×{queries}×{keys}",
                  lambda ops, q, k, v: ops.attention(q, k, v), q, k, v)  # fmt: skip


def operations_on_rows() -> dict[str, Call]:
    """name → call(ops, x, w) of (rows, columns) and (columns,)."""
    return {
        "softmax": lambda ops, x, w: ops.softmax(x * w),
        "layer_norm": lambda ops, x, w: ops.layer_norm(x, x.shape[-1:], w, w),
        "rms_norm": lambda ops, x, w: ops.rms_norm(x, x.shape[-1:], w, 1e-6),
        "add_layer_norm": lambda ops, x, w: ops.add_layer_norm(x, x, x.shape[-1:], w)[0],
        "linear_add": lambda ops, x, w: ops.linear_add(x, w.diag(), w, x),
    }


def strided(card: Card) -> None:
    """Transposed, sliced, misaligned and expanded inputs against the same numbers contiguous."""

    def views(*shape: int) -> dict[str, Tensor]:
        return {
            "transposed": card.randn(*shape[:-2], shape[-1], shape[-2]).mT,
            "every second row": card.randn(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :],
            "misaligned": card.randn(*shape[:-1], shape[-1] + 3)[..., 3:],
            "expanded": card.randn(*shape[:-2], 1, shape[-1]).expand(shape),
        }

    w = card.randn(96)
    for view, x in views(37, 96).items():
        for name, call in operations_on_rows().items():
            card.hold(f"{name} {view}", call, x, w)
    for view, q in views(2, 3, 70, 64).items():
        k, v = views(2, 3, 90, 64)[view], card.randn(2, 3, 90, 64)
        card.hold(f"attention {view}",
                  lambda ops, q, k, v: ops.attention(q, k, v, is_causal=True), q, k, v)  # fmt: skip


def large_offsets(card: Card) -> None:
    """Rows and batches that lie more than 2³¹ elements apart; only they are ever touched."""
    far = (1 << 31) + 64
    try:
        storage = torch.empty(far + (1 << 20), device=card.device, dtype=torch.bfloat16)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        card.notes.append(f"no room for {2 * far >> 30} GiB: {str(error).splitlines()[0]}")
        return

    def apart(*shape: int) -> Tensor:
        inner = torch.empty(shape, device="meta").stride()
        view = storage.as_strided((2, *shape), (far, *inner))
        return view.copy_(card.randn(2, *shape))

    rows = apart(4096)
    want = rows.contiguous()
    with ft.use_backend(card.backend):
        card.equal("softmax", ft.softmax(rows), ft.softmax(want))
        weight = card.randn(4096)
        card.equal("layer_norm", ft.layer_norm(rows, (4096,), weight),
                   ft.layer_norm(want, (4096,), weight))  # fmt: skip
        query = apart(2, 100, 64)
        plain = query.contiguous()
        card.equal(
            "attention", ft.attention(query, query, query), ft.attention(plain, plain, plain)
        )


# ---- the device ---------------------------------------------------------------------------------


def small_operations(card: Card) -> dict[str, tuple[Call, list[Tensor]]]:
    """name → (function, inputs): one of each family, large enough for several blocks."""
    x, w = card.randn(300, 768), card.randn(768)
    q, k, v = (card.randn(2, 4, 333, 64) for _ in "qkv")
    weight = card.randn(768, 768)
    target = torch.arange(300, device=card.device)
    return {
        "softmax": (ft.softmax, [x]),
        "layer_norm": (lambda x, w: ft.layer_norm(x, (768,), w, w), [x, w]),
        "add_rms_norm": (lambda x, w: ft.add_rms_norm(x, x, (768,), w)[0], [x, w]),
        "cross_entropy": (lambda x: ft.cross_entropy(x, target, reduction="none"), [x]),
        "linear_add": (lambda x, m, w: ft.linear_add(x, m, w, x), [x, weight, w]),
        "attention": (lambda *t: ft.attention(*t, is_causal=True), [q, k, v]),
        "attention 128": (lambda *t: ft.attention(*t), [card.randn(1, 2, 200, 128)] * 3),
    }


def _replayed(
    card: Card, label: str, run: Callable[[], list[Tensor]], inputs: list[Tensor]
) -> None:
    """A run captured once and replayed on new numbers in the same places, against a plain call."""
    if not card.real:
        first = run()
        card.equal(f"{label} run again", run(), first)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls may set up what a capture must not
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for turn in range(2):
        for x in inputs:
            if x.is_floating_point():
                with torch.no_grad():
                    x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        card.equal(f"{label} replay {turn}", captured, run())


def _graphs(card: Card, backward: bool) -> None:
    if not card.real:
        card.stand_in("CUDA graph")
    with ft.use_backend(card.backend):
        for name, (function, inputs) in small_operations(card).items():
            distinct = list({id(x): x for x in inputs}.values())
            try:
                if backward:
                    _replayed(card, name, lambda f=function, i=inputs: gradients(f, *i), distinct)
                else:
                    _replayed(card, name, lambda f=function, i=inputs: tuples(f(*i)), distinct)
            except RuntimeError as error:
                card.claim(name, False, f"{type(error).__name__}: {error}"[:300])
                if card.real:
                    torch.cuda.synchronize()  # raises where the context is broken: no use going on


def graph_forward(card: Card) -> None:
    """CUDA graph capture and replay of the forward passes."""
    _graphs(card, backward=False)


def graph_backward(card: Card) -> None:
    """CUDA graph capture and replay of forward and backward pass together."""
    _graphs(card, backward=True)


def streams(card: Card) -> None:
    """A kernel runs on the current stream, and two streams at once disturb neither.

    The input is written on the side stream after a delay: a kernel on another stream would read
    what was there before.
    """
    if not card.real:
        card.stand_in("stream")
    with ft.use_backend(card.backend):
        for name, (function, inputs) in small_operations(card).items():
            want = gradients(function, *inputs)
            sides = [torch.cuda.Stream() for _ in range(2)] if card.real else [None, None]
            got = []
            if card.real:
                torch.cuda.synchronize()
            for side in sides:
                with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
                    late = [torch.zeros_like(x) for x in inputs]
                    if card.real:
                        torch.cuda._sleep(20_000_000)
                    for empty_, x in zip(late, inputs):
                        empty_.copy_(x)
                    got.append(gradients(function, *late))
            if card.real:
                torch.cuda.synchronize()
            for i, result in enumerate(got):
                card.equal(f"{name} stream {i}", result, want)


def threads(card: Card) -> None:
    """Four Python threads on one device, each on a stream of its own."""
    operations = small_operations(card)
    with ft.use_backend(card.backend):
        want = {name: gradients(f, *inputs) for name, (f, inputs) in operations.items()}
        if card.real:
            torch.cuda.synchronize()
        problems: list[str] = []

        def work(number: int) -> None:
            side = torch.cuda.stream(torch.cuda.Stream()) if card.real else contextlib.nullcontext()
            try:
                with side:
                    for _ in card.some(range(5)):
                        for name, (function, inputs) in operations.items():
                            got = gradients(function, *inputs)
                            if not all(map(torch.equal, got, want[name])):
                                problems.append(f"{name} differs in thread {number}")
            except Exception as error:  # a thread's error would be lost
                problems.append(f"thread {number}: {type(error).__name__}: {error}"[:300])

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    card.claim("threads", not problems, "; ".join(sorted(set(problems))[:5]))


def deterministic(card: Card) -> None:
    """Bit-equal outputs and gradients from run to run under use_deterministic_algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch's own parts may only warn
    operations = small_operations(card)
    table = card.randn(1000, 256)
    ids = torch.randint(1000, (5000,), device=card.device)
    operations["embedding"] = (lambda t: ft.embedding(ids, t), [table])
    bias = card.randn(1, 1, 333, 333)
    operations["attention with a bias"] = (
        lambda q, k, v, b: ft.attention(q, k, v, bias=b),
        [*operations["attention"][1], bias],
    )
    with ft.use_backend(card.backend):
        for name, (function, inputs) in operations.items():
            first = gradients(function, *inputs)
            for turn in card.some(range(4)):
                card.equal(f"{name} run {turn}", gradients(function, *inputs), first)


def dropout(card: Card) -> None:
    """The same seed drops the same places on every backend, and about as many as were asked for."""
    q, k, v = (card.randn(2, 2, 300, 64, dtype=torch.float32) for _ in "qkv")
    eye = torch.eye(64, device=card.device).expand(2, 2, 64, 64).contiguous()
    found: dict[str, list[Tensor]] = {}
    for backend in (card.backend, "torch"):
        with ft.use_backend(backend):
            torch.manual_seed(11)
            found[backend] = gradients(lambda *t: ft.attention(*t, dropout_p=0.3), q, k, v)
            torch.manual_seed(12)
            # Values that are the identity show each weight that was kept.
            found[backend].append(ft.attention(q, k[:, :, :64], eye, dropout_p=0.3) != 0)
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    for name, got, want in zip(names, found[card.backend], found["torch"]):
        error = float((got - want).abs().max() / want.abs().max())
        card.claim(name, error < 1e-2, f"differs from the reference by {error:.2g}")
    card.equal("kept places", found[card.backend][-1].float(), found["torch"][-1].float())
    kept = float(found[card.backend][-1].float().mean())
    card.claim("share kept", abs(kept - 0.7) < 0.02, f"is {kept:.3f}, not 0.7")


def swapped_layers(card: Card) -> None:
    """ft.swap of torch's encoder layers on the device, held to the original by its own verify."""
    for dtype in (torch.float32, torch.bfloat16)[: 2 if card.real else 1]:
        layer = torch.nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        model = model.to(card.device, dtype)
        report = ft.swap(model)
        found = report.verify(card.randn(2, 100, 256, dtype=dtype), show=False)
        card.claim(f"{short(dtype)}, {len(report.swapped)} modules", found.ok, str(found.problem))


PROBES: dict[str, Callable[[Card], None]] = {
    probe.__name__: probe
    for probe in (
        norm_columns, softmax_columns, attention_head_sizes, linear_tiles, cross_entropy_columns,
        attention_mask_128, graph_forward, graph_backward, streams, threads, deterministic,
        attention_varlen_100000, strided, large_offsets, empty, dropout, swapped_layers,
    )
}  # fmt: skip


def probe(name: str, device: str, backend: str) -> dict[str, Any]:
    """Runs one; an exception is a finding."""
    card = Card(device, backend)
    began = time.monotonic()
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        PROBES[name](card)
        if card.real:
            torch.cuda.synchronize()
    except Exception as error:  # whatever goes wrong there is what the probe is for
        card.findings.append(f"{type(error).__name__}: {error}"[:500])
    finally:
        torch.use_deterministic_algorithms(before)
    status = "finding" if card.findings else "ok" if card.checks else "skipped"
    return {
        "probe": name, "device": device, "backend": backend, "status": status,
        "checks": card.checks, "worst": round(card.worst, 3), "findings": len(card.findings),
        "notes": [*card.findings[:20], *card.notes], "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def stand_in_backend() -> str:
    """The CPU's backend: the C++ kernels, or the reference where they are not built."""
    return "cpu" if any(name.startswith("cpu") for name in runnable()) else "torch"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="default: cuda, on the CPU cpu")
    parser.add_argument("--list", action="store_true", help="name the probes")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(PROBES))
        return 0
    if args.name not in PROBES:
        parser.error(f"{args.name!r} is not one of {', '.join(PROBES)}")
    backend = args.backend or ("cuda" if args.device != "cpu" else stand_in_backend())
    found = probe(args.name, args.device, backend)
    print(json.dumps(found, ensure_ascii=False), flush=True)
    return 1 if found["status"] == "finding" else 0


if __name__ == "__main__":
    raise SystemExit(main())
