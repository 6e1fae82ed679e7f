"""Every kernel on an NVIDIA GPU beside its peers and the card's own ceilings; JSON out.

    python -m fasttransformer.benchmarks.gpu --json results.json [--only attention] [--seconds 300]

Ceilings are measured first, in the same run: a copy (bytes read and written), a read, a bf16 matrix
product, and what a call costs at least. A case is timed by Triton's ``do_bench`` (events, L2
flushed between calls). Peers that are installed join: torch eager and compiled, each of torch's
SDPA backends by force, FlexAttention, flash-attn, xformers, quack and Liger. A candidate whose
result is not ours is recorded as wrong, one that fails with its error. The file has the schema of
record.py. ``benchmarks/gpu_run.sh`` calls this after it has built and tested the package.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer.benchmarks import memory, peers, record, report
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    backward_of,
    environment,
)
from fasttransformer.benchmarks.agreement import difference
from fasttransformer.benchmarks.clock import Timing, timing_of

BF16 = torch.bfloat16
COLUMNS = (1024, 4096, 16384, 65536, 262144)
ELEMENTS = 1 << 28  # 512 MiB of 16-bit numbers: ten times an L2
TRITON = f"{OURS} triton"
#: Candidates that are no peers: a floor, or the same numbers in another order.
UNLIKE = ("matmul alone", "torch one by one")
COMPILED = False  # --compile: torch.compile is a peer of operations that have one torch candidate


def randn(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_(grad)


def both(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Ours on the CUDA and on the Triton backend."""
    return {
        OURS: lambda *inputs: function(*inputs, backend="cuda"),
        TRITON: lambda *inputs: function(*inputs, backend="triton"),
    }


def peer(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


# ---- cases --------------------------------------------------------------------------------------


def forward_and_backward(
    op: str,
    name: str,
    functions: dict[str, Callable[..., Any]],
    inputs: Callable[[], list[Tensor]],
    *,
    forward: dict[str, int],
    backward: dict[str, int],
    dtype: torch.dtype = BF16,
    along: tuple[str, float] | None = None,
    compared: bool = True,
) -> Iterator[Case]:
    """The two cases of an operation; a candidate makes its inputs when it is timed."""
    if COMPILED and "torch" in functions:
        functions = functions | {"torch.compile": torch.compile(functions["torch"], dynamic=False)}

    def make(run: Callable[..., Candidate]) -> Callable[[], dict[str, Candidate]]:
        return lambda: {
            who: (lambda function=function: run(function, *inputs()))
            for who, function in functions.items()
        }

    def once(function: Callable[..., Any], *tensors: Tensor) -> Candidate:
        detached = [t.detach() for t in tensors]
        return lambda: function(*detached)

    where: dict[str, Any] = {"device": "cuda", "along": along, "compared": compared}
    yield Case(op, name, dtype, make(once), **where, **forward)
    yield Case(f"{op} backward", name, dtype, make(backward_of), **where, **backward)


def row_cases() -> Iterator[Case]:
    """softmax, norms and cross entropy: bound by memory."""
    for columns in COLUMNS:
        rows = ELEMENTS // columns
        size = rows * columns * 2
        name = f"{rows}×{columns}"

        def x(rows: int = rows, columns: int = columns) -> Tensor:
            return randn(rows, columns, grad=True)

        def vectors(count: int, columns: int = columns) -> list[Tensor]:
            return [randn(columns, grad=True) for _ in range(count)]

        functions = both(ft.softmax)
        functions["torch"] = lambda x: torch.softmax(x, -1)
        if (quack := peer("quack", "softmax")) is not None:
            functions["quack"] = quack
        yield from forward_and_backward(
            "softmax", name, functions, lambda: [x()],
            forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

        functions = both(lambda x, w, b, **kw: ft.layer_norm(x, x.shape[-1:], w, b, **kw))
        functions["torch"] = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)
        yield from forward_and_backward(
            "layer_norm", name, functions, lambda: [x(), *vectors(2)],
            forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

        functions = both(lambda x, w, **kw: ft.rms_norm(x, x.shape[-1:], w, 1e-6, **kw))
        functions["torch"] = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)
        if (quack := peer("quack", "rmsnorm")) is not None:
            functions["quack"] = quack
        if (liger := peer("liger_kernel.transformers.functional", "liger_rms_norm")) is not None:
            functions["liger"] = lambda x, w: liger(x, w, 1e-6)
        yield from forward_and_backward(
            "rms_norm", name, functions, lambda: [x(), *vectors(1)],
            forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

        for op, norm in (("add_layer_norm", F.layer_norm), ("add_rms_norm", F.rms_norm)):
            ours = getattr(ft, op)

            def torchs(x: Tensor, y: Tensor, w: Tensor, norm: Any = norm) -> tuple:
                total = x + y
                return norm(total, total.shape[-1:], w), total

            functions = both(lambda x, y, w, ours=ours, **kw: ours(x, y, x.shape[-1:], w, **kw))
            functions |= {"torch": torchs}
            yield from forward_and_backward(
                op, name, functions, lambda: [x(), x(), *vectors(1)],
                forward={"bytes": 4 * size}, backward={"bytes": 4 * size})  # fmt: skip

        def classes(rows: int = rows, columns: int = columns) -> Tensor:
            return torch.randint(columns, (rows,), device="cuda")

        functions = {
            OURS: lambda x, t: ft.cross_entropy(x, t, backend="cuda"),
            "torch": F.cross_entropy,
        }
        if (quack := peer("quack", "cross_entropy")) is not None:
            functions["quack"] = quack
        yield from forward_and_backward(
            "cross_entropy", name, functions, lambda: [x(), classes()],
            forward={"bytes": size}, backward={"bytes": 2 * size})  # fmt: skip


def _others(causal: bool) -> dict[str, Callable[..., Tensor]]:
    """flash-attn (its third version before its second), xformers, and with --compile
    FlexAttention: of (batch, heads, length, head_dim) that lie as (batch, length, heads, head_dim).
    """

    def transposed(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            out = function(*(x.transpose(1, 2) for x in inputs))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    found: dict[str, Callable[..., Tensor]] = {}
    for module in ("flash_attn_interface", "flash_attn"):
        if "flash-attn" not in found and (flash := peer(module, "flash_attn_func")) is not None:
            found["flash-attn"] = transposed(lambda q, k, v, f=flash: f(q, k, v, causal=causal))
    xformers = peer("xformers.ops", "memory_efficient_attention")
    lower = peer("xformers.ops", "LowerTriangularMask")
    if xformers is not None and lower is not None:
        mask = lower() if causal else None
        found["xformers"] = transposed(lambda q, k, v: xformers(q, k, v, attn_bias=mask))
    if COMPILED:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        call = peers.compiled(flex_attention)

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return call(q, k, v, block_mask=_lower_blocks(q.shape[2]) if causal else None)

        @functools.cache
        def _lower_blocks(length: int) -> Any:
            return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)

        found["FlexAttention"] = flex
    return found


def attention_cases() -> Iterator[Case]:
    """FlashAttention-3's grid: 16k tokens, hidden size 2048."""
    from torch.nn.attention import SDPBackend

    for head_dim in (64, 128, 256):
        for length in (512, 1024, 4096, 16384):
            for causal in (False, True):
                heads, batch = 2048 // head_dim, 16384 // length
                functions = both(
                    lambda q, k, v, causal=causal, **kw: ft.attention(
                        q, k, v, is_causal=causal, **kw
                    )
                )
                for backend in (
                    SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.FLASH_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION,
                ):
                    functions[f"torch {backend.name.partition('_')[0].lower()}"] = (
                        peers.with_backend(
                            backend,
                            functools.partial(F.scaled_dot_product_attention, is_causal=causal),
                        )
                    )
                functions |= _others(causal)
                flops = 4 * batch * heads * length * length * head_dim // (2 if causal else 1)
                shape = (batch, length, heads, head_dim)
                size = 4 * 2 * 16384 * 2048
                yield from forward_and_backward(
                    "attention",
                    f"{batch}×{heads}×{length}×{head_dim}" + (" causal" if causal else ""),
                    functions,
                    lambda shape=shape: [randn(*shape, grad=True).transpose(1, 2) for _ in "qkv"],
                    forward={"flops": flops, "bytes": size},
                    backward={"flops": flops * 5 // 2, "bytes": 2 * size},
                    along=(f"head size {head_dim}" + ", causal" * causal, length),
                )
    # Decode: one query, 32 heads on 8, 16k keys.
    keys = (8, 8, 16384, 128)
    functions = both(ft.attention)
    functions["torch"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def decode(function: Callable[..., Any]) -> Candidate:
        inputs = randn(8, 32, 1, 128), randn(*keys), randn(*keys)
        return lambda: function(*inputs)

    def make() -> dict[str, Candidate]:
        return {
            who: (lambda function=function: decode(function)) for who, function in functions.items()
        }

    size = 2 * 8 * 8 * 16384 * 128 * 2
    yield Case("attention", "decode 8×32/8×1×16384×128", BF16, make, bytes=size, device="cuda")


def packed_cases() -> Iterator[Case]:
    """16k tokens in sequences of 64 … 2,048, and parts of attention merged."""
    lengths = [64, 2048, 128, 1024, 256, 512, 96, 1536, 320, 768] * 2
    heads, head_dim, longest = 16, 128, max(lengths)

    def inputs() -> list[Tensor]:
        bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        return [*(randn(sum(lengths), heads, head_dim, grad=True) for _ in "qkv"), bounds]

    flash = peer("flash_attn", "flash_attn_varlen_func")
    for causal in (False, True):

        def ours(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, c: bool = causal) -> Tensor:
            lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
            options: dict[str, Any] = {"is_causal": c, "backend": "cuda"}
            return ft.attention_varlen(q, k, v, bounds, bounds, **lengths, **options)

        def one_by_one(q: Tensor, k: Tensor, v: Tensor, _: Tensor, c: bool = causal) -> Tensor:
            outs = [
                F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts), is_causal=c)
                for parts in zip(*(x.split(lengths) for x in (q, k, v)))
            ]
            return torch.cat(outs, 1)

        functions: dict[str, Callable[..., Any]] = {OURS: ours, "torch one by one": one_by_one}
        if flash is not None:
            functions["flash-attn"] = lambda q, k, v, bounds, c=causal: flash(
                q, k, v, bounds, bounds, longest, longest, causal=c
            )
        flops = 4 * sum(n * n for n in lengths) * heads * head_dim // (2 if causal else 1)
        yield from forward_and_backward(
            "attention_varlen", f"{len(lengths)} of 64…2048" + (" causal" if causal else ""),
            functions, inputs,
            forward={"flops": flops}, backward={"flops": flops * 5 // 2})  # fmt: skip

    shape = (4, 8, 32, 2048, 128)
    size = 2 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4]

    def merge_torch(outs: Tensor, lses: Tensor) -> Tensor:
        weights = torch.softmax(lses, 0).unsqueeze(-1)
        return (weights * outs).sum(0).to(outs.dtype)

    yield from forward_and_backward(
        "merge_attention", "×".join(map(str, shape)),
        {OURS: lambda o, l: ft.merge_attention(o, l, backend="cuda")[0], "torch": merge_torch},
        lambda: [randn(*shape, grad=True), randn(*shape[:-1], dtype=torch.float32, grad=True)],
        forward={"bytes": size * 5 // 4}, backward={"bytes": size * 9 // 4})  # fmt: skip


def linear_cases() -> Iterator[Case]:
    for rows, features in ((16, 4096), (4096, 1024), (8192, 4096), (16384, 8192)):
        flops = 2 * rows * features * features
        name = f"{rows}×{features}×{features}"

        def inputs(rows: int = rows, features: int = features) -> list[Tensor]:
            return [randn(rows, features, grad=True), randn(features, features, grad=True),
                    randn(features, grad=True), randn(rows, features, grad=True)]  # fmt: skip

        functions = both(ft.linear_add)
        functions["torch"] = lambda x, w, b, r: F.linear(x, w, b) + r
        functions["matmul alone"] = lambda x, w, b, r: F.linear(x, w)
        yield from forward_and_backward(
            "linear_add", name, functions, inputs,
            forward={"flops": flops}, backward={"flops": 2 * flops})  # fmt: skip

        functions = both(lambda *t, **kw: ft.linear_add(*t, dropout_p=0.1, **kw))
        functions["torch"] = lambda x, w, b, r: F.dropout(F.linear(x, w, b), 0.1) + r
        yield from forward_and_backward(
            "linear_add", f"{name} dropout 0.1", functions, inputs, compared=False,
            forward={"flops": flops}, backward={"flops": 2 * flops})  # fmt: skip

        functions = both(lambda x, w, b, r, **kw: ft.linear_add_layer_norm(x, w, b, r, b, b, **kw))
        functions["torch"] = lambda x, w, b, r: F.layer_norm(F.linear(x, w, b) + r, b.shape, b, b)
        functions["matmul alone"] = lambda x, w, b, r: F.linear(x, w)
        yield from forward_and_backward(
            "linear_add_layer_norm", name, functions, inputs,
            forward={"flops": flops}, backward={"flops": 2 * flops})  # fmt: skip


def cases() -> Iterator[Case]:
    yield from row_cases()
    yield from attention_cases()
    yield from packed_cases()
    yield from linear_cases()


# ---- measuring ----------------------------------------------------------------------------------


def measure(function: Candidate, milliseconds: int = 60) -> Timing:
    from triton.testing import do_bench

    times = do_bench(function, warmup=10, rep=milliseconds, return_mode="all")
    return timing_of([t / 1e3 for t in times])


def ceilings() -> dict[str, tuple[float, str]]:
    """name → (value, unit): the best of five medians."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    a, b = randn(8192, 8192), randn(8192, 8192)
    product = 2 * 8192**3

    def best(function: Candidate, work: float) -> float:
        return max(work / measure(function).median for _ in range(5)) / 1e9

    return {
        "copy": (best(lambda: target.copy_(source), 2 * source.numel()), "GB/s"),
        "read": (best(lambda: source.view(torch.int64).sum(), source.numel()), "GB/s"),
        "matmul bf16": (best(lambda: a @ b, product), "GFLOP/s"),
        "operator call": (call_microseconds(), "µs"),
    }


def call_microseconds() -> float:
    """Of the processor's time: an operator on one element, launched and not waited for."""
    x, calls = torch.ones(1, device="cuda"), 1000
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            torch.neg(x)
        took = time.perf_counter() - start
    torch.cuda.synchronize()
    return took / calls * 1e6


def row(case: Case, limits: dict[str, tuple[float, str]]) -> record.Row:
    """Measures a case's candidates one after the other, each on inputs of its own from one seed."""
    times: dict[str, Timing] = {}
    wrong: dict[str, str] = {}
    wanted: object = None
    for name, make in case.make().items():
        try:
            torch.manual_seed(0)
            candidate: Any = make()
            result = candidate()
            if name == OURS:
                wanted = result
            elif wanted is not None and name not in UNLIKE:
                how = difference(result, wanted, case.dtype)
                if how is not None:
                    wrong[name] = how
                    continue
            del result
            times[name] = measure(candidate)
        except Exception as error:  # a peer's failure is a result; ours too, and it is printed
            wrong[name] = f"fails: {type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
    which = "copy" if case.memory_bound else "matmul bf16"
    return record.row_of(case, times, wrong, (which, limits[which][0]))


def show(found: record.Row) -> None:
    cells = []
    for name, figures in found.candidates.items():
        text = figures.wrong or ""
        if figures.rate is not None and found.ceiling is not None:
            text = f"{figures.rate:.0f} ({figures.rate / found.ceiling[1]:.0%})"
        cells.append(f"{name} {text}")
    print(f"{found.op} {found.case} [{found.unit}]: " + ", ".join(cells), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every case")
    parser.add_argument("--report", type=Path, metavar="DIR", help="page, pictures and tables")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--compile", action="store_true", help="torch.compile is a peer as well")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop beginning cases then")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args(argv)
    global COMPILED
    COMPILED = args.compile
    if args.list:
        for case in cases():
            print(case.id)
        return 0
    if not torch.cuda.is_available():
        print("gpu: torch sees no NVIDIA GPU here", file=sys.stderr)
        return 2
    start = time.monotonic()
    made = record.Run(
        environment(),
        command=record.command_line(
            "python", "-m", "fasttransformer.benchmarks.gpu", *sys.argv[1:]
        ),
        ceilings=ceilings(),
        peers=peers.available(),
    )
    print("ceilings: " + made.ceilings_in_words)
    made.complete = True
    for case in cases():
        if args.only and args.only not in case.id:
            continue
        if time.monotonic() - start > args.seconds:
            print(f"stopped before {case.id}: {args.seconds:.0f} s were over")
            made.complete = False
            break
        made.rows.append(row(case, made.ceilings))
        show(made.rows[-1])
        if args.json:
            record.save(made, args.json)
    if args.report:
        made.memory = memory.measured(False, "cuda")
        report.write(made, args.report)
    if args.json:
        record.save(made, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
