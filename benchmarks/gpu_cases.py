"""The cases of the GPU benchmark, in the order of their importance, and how long each will take.

A run may be cut at any case, so attention comes first (head size 128, long sequences before short,
forward and backward next to each other), then what memory bounds, products, and whole models.
:data:`CARD` has the sizes for a large GPU. :data:`REHEARSAL` runs the same cases small on the CPU,
so that a machine without a GPU can try the whole program.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import fasttransformer as ft
from fasttransformer.benchmarks import peers
from fasttransformer.benchmarks._shared import OURS, Candidate, Case, backward_of

BF16 = torch.bfloat16
TRITON = f"{OURS} triton"
#: Candidates that are no peers: a floor, or the same numbers in another order.
UNLIKE = ("matmul alone", "torch one by one")
HIDDEN = 2048  # heads × head size of attention's grid


@dataclass(frozen=True)
class Scale:
    """Where the cases run and how large they are. Lengths and columns: the most telling first."""

    device: str = "cuda"
    ours: str = "cuda"  # the backend of our two candidates
    second: str = "triton"
    compiled: bool = False  # torch.compile and FlexAttention are peers as well
    tokens: int = 16384
    lengths: tuple[int, ...] = (16384, 4096, 8192, 2048, 1024, 512)
    head_dims: tuple[int, ...] = (128, 64, 256)
    elements: int = 1 << 28  # 512 MiB of 16-bit numbers: ten times an L2
    columns: tuple[int, ...] = (4096, 65536, 16384, 1024, 262144)
    products: tuple[tuple[int, int], ...] = ((8192, 4096), (16384, 8192), (4096, 1024), (16, 4096))
    models: tuple[tuple[int, int], ...] = ((32, 512), (8, 128))  # batch, length

    def randn(self, *shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).requires_grad_(grad)

    def both(self, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Ours on its two backends."""
        return {
            OURS: lambda *inputs: function(*inputs, backend=self.ours),
            TRITON: lambda *inputs: function(*inputs, backend=self.second),
        }


CARD = Scale()
REHEARSAL = Scale(
    device="cpu", ours="cpu", second="torch", tokens=256, lengths=(256, 128),
    elements=1 << 16, columns=(256, 4096), products=((64, 256),), models=((1, 32),),
)  # fmt: skip


def peer(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def forward_and_backward(
    scale: Scale,
    op: str,
    name: str,
    functions: dict[str, Callable[..., Any]],
    inputs: Callable[[], list[Tensor]],
    *,
    forward: dict[str, int],
    backward: dict[str, int],
    along: tuple[str, float] | None = None,
    compared: bool = True,
) -> Iterator[Case]:
    """The two cases of an operation; a candidate makes its inputs when it is timed."""
    if scale.compiled and "torch" in functions:
        functions = functions | {"torch.compile": torch.compile(functions["torch"], dynamic=False)}

    def make(run: Callable[..., Candidate]) -> Callable[[], dict[str, Candidate]]:
        return lambda: {
            who: (lambda function=function: run(function, *inputs()))
            for who, function in functions.items()
        }

    def once(function: Callable[..., Any], *tensors: Tensor) -> Candidate:
        detached = [t.detach() for t in tensors]
        return lambda: function(*detached)

    where: dict[str, Any] = {"device": scale.device, "along": along, "compared": compared}
    yield Case(op, name, BF16, make(once), **where, **forward)
    yield Case(f"{op} backward", name, BF16, make(backward_of), **where, **backward)


# ---- attention ----------------------------------------------------------------------------------


def _others(scale: Scale, causal: bool) -> dict[str, Callable[..., Tensor]]:
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
    if scale.compiled:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        call = peers.compiled(flex_attention)

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return call(q, k, v, block_mask=_lower_blocks(q.shape[2]) if causal else None)

        @functools.cache
        def _lower_blocks(length: int) -> Any:
            return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)

        found["FlexAttention"] = flex
    return found


#: torch's SDPA held to each backend. The third is the slowest and takes part in short cases only.
SDPA = {
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EFFICIENT_UP_TO = 1024


def attention_cases(scale: Scale) -> Iterator[Case]:
    """FlashAttention-3's grid: 16k tokens, hidden size 2048."""
    for head_dim in scale.head_dims:
        for length in scale.lengths:
            for causal in (False, True):
                yield from _attention(scale, head_dim, length, causal)


def _attention(scale: Scale, head_dim: int, length: int, causal: bool) -> Iterator[Case]:
    heads, batch = HIDDEN // head_dim, scale.tokens // length
    functions = scale.both(lambda q, k, v, **kw: ft.attention(q, k, v, is_causal=causal, **kw))
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
    for name, backend in SDPA.items():
        if name != "torch efficient" or length <= EFFICIENT_UP_TO:
            functions[name] = peers.with_backend(backend, sdpa)
    functions |= _others(scale, causal)
    flops = 4 * batch * heads * length * length * head_dim // (2 if causal else 1)
    size = 4 * 2 * scale.tokens * HIDDEN
    yield from forward_and_backward(
        scale,
        "attention",
        f"{batch}×{heads}×{length}×{head_dim}" + (" causal" if causal else ""),
        functions,
        lambda: [
            scale.randn(batch, length, heads, head_dim, grad=True).transpose(1, 2) for _ in "qkv"
        ],
        forward={"flops": flops, "bytes": size},
        backward={"flops": flops * 5 // 2, "bytes": 2 * size},
        along=(f"head size {head_dim}" + ", causal" * causal, length),
    )


def decode_cases(scale: Scale) -> Iterator[Case]:
    """One query, 32 heads on 8, as many keys as the longest sequence."""
    keys = (8, 8, scale.tokens, 128)
    functions = scale.both(ft.attention)
    functions["torch"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def decode(function: Callable[..., Any]) -> Candidate:
        inputs = scale.randn(8, 32, 1, 128), scale.randn(*keys), scale.randn(*keys)
        return lambda: function(*inputs)

    def make() -> dict[str, Candidate]:
        return {
            who: (lambda function=function: decode(function)) for who, function in functions.items()
        }

    size = 2 * 8 * 8 * scale.tokens * 128 * 2
    name = f"decode 8×32/8×1×{scale.tokens}×128"
    yield Case("attention", name, BF16, make, bytes=size, device=scale.device)


def packed_cases(scale: Scale) -> Iterator[Case]:
    """16k tokens in sequences of 64 … 2,048, and parts of attention merged."""
    share = CARD.tokens // scale.tokens
    lengths = [64, 2048, 128, 1024, 256, 512, 96, 1536, 320, 768] * 2
    lengths = [length // share for length in lengths]
    heads, head_dim, longest = 16, 128, max(lengths)

    def inputs() -> list[Tensor]:
        bounds = torch.tensor([0, *lengths], device=scale.device).cumsum(0).int()
        tensors = [scale.randn(sum(lengths), heads, head_dim, grad=True) for _ in "qkv"]
        return [*tensors, bounds]

    flash = peer("flash_attn", "flash_attn_varlen_func")
    for causal in (False, True):

        def ours(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, c: bool = causal) -> Tensor:
            most = {"max_seqlen_q": longest, "max_seqlen_k": longest}
            options: dict[str, Any] = {"is_causal": c, "backend": scale.ours}
            return ft.attention_varlen(q, k, v, bounds, bounds, **most, **options)

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
            scale, "attention_varlen",
            f"{len(lengths)} of {min(lengths)}…{longest}" + (" causal" if causal else ""),
            functions, inputs,
            forward={"flops": flops}, backward={"flops": flops * 5 // 2})  # fmt: skip

    shape = (4, 8, 32, 2048 // share, 128)
    size = 2 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4]

    def merge_torch(outs: Tensor, lses: Tensor) -> Tensor:
        weights = torch.softmax(lses, 0).unsqueeze(-1)
        return (weights * outs).sum(0).to(outs.dtype)

    yield from forward_and_backward(
        scale, "merge_attention", "×".join(map(str, shape)),
        {OURS: lambda o, l: ft.merge_attention(o, l, backend=scale.ours)[0], "torch": merge_torch},
        lambda: [scale.randn(*shape, grad=True),
                 scale.randn(*shape[:-1], dtype=torch.float32, grad=True)],
        forward={"bytes": size * 5 // 4}, backward={"bytes": size * 9 // 4})  # fmt: skip


# ---- rows and products --------------------------------------------------------------------------


def row_cases(scale: Scale) -> Iterator[Case]:
    """softmax, norms and cross entropy: bound by memory."""
    for columns in scale.columns:
        yield from _rows(scale, scale.elements // columns, columns)


def _rows(scale: Scale, rows: int, columns: int) -> Iterator[Case]:
    size = rows * columns * 2
    name = f"{rows}×{columns}"

    def x() -> Tensor:
        return scale.randn(rows, columns, grad=True)

    def vectors(count: int) -> list[Tensor]:
        return [scale.randn(columns, grad=True) for _ in range(count)]

    functions = scale.both(ft.softmax)
    functions["torch"] = lambda x: torch.softmax(x, -1)
    if (quack := peer("quack", "softmax")) is not None:
        functions["quack"] = quack
    yield from forward_and_backward(
        scale, "softmax", name, functions, lambda: [x()],
        forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

    functions = scale.both(lambda x, w, b, **kw: ft.layer_norm(x, x.shape[-1:], w, b, **kw))
    functions["torch"] = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)
    yield from forward_and_backward(
        scale, "layer_norm", name, functions, lambda: [x(), *vectors(2)],
        forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

    functions = scale.both(lambda x, w, **kw: ft.rms_norm(x, x.shape[-1:], w, 1e-6, **kw))
    functions["torch"] = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)
    if (quack := peer("quack", "rmsnorm")) is not None:
        functions["quack"] = quack
    if (liger := peer("liger_kernel.transformers.functional", "liger_rms_norm")) is not None:
        functions["liger"] = lambda x, w: liger(x, w, 1e-6)
    yield from forward_and_backward(
        scale, "rms_norm", name, functions, lambda: [x(), *vectors(1)],
        forward={"bytes": 2 * size}, backward={"bytes": 3 * size})  # fmt: skip

    for op, norm in (("add_layer_norm", F.layer_norm), ("add_rms_norm", F.rms_norm)):
        ours = getattr(ft, op)

        def torchs(x: Tensor, y: Tensor, w: Tensor, norm: Any = norm) -> tuple:
            total = x + y
            return norm(total, total.shape[-1:], w), total

        functions = scale.both(lambda x, y, w, ours=ours, **kw: ours(x, y, x.shape[-1:], w, **kw))
        functions |= {"torch": torchs}
        yield from forward_and_backward(
            scale, op, name, functions, lambda: [x(), x(), *vectors(1)],
            forward={"bytes": 4 * size}, backward={"bytes": 4 * size})  # fmt: skip

    functions = {
        OURS: lambda x, t: ft.cross_entropy(x, t, backend=scale.ours),
        "torch": F.cross_entropy,
    }
    if (quack := peer("quack", "cross_entropy")) is not None:
        functions["quack"] = quack
    yield from forward_and_backward(
        scale, "cross_entropy", name, functions,
        lambda: [x(), torch.randint(columns, (rows,), device=scale.device)],
        forward={"bytes": size}, backward={"bytes": 2 * size})  # fmt: skip


def linear_cases(scale: Scale) -> Iterator[Case]:
    for rows, features in scale.products:
        yield from _products(scale, rows, features)


def _products(scale: Scale, rows: int, features: int) -> Iterator[Case]:
    flops = 2 * rows * features * features
    name = f"{rows}×{features}×{features}"

    def inputs() -> list[Tensor]:
        shapes = ((rows, features), (features, features), (features,), (rows, features))
        return [scale.randn(*shape, grad=True) for shape in shapes]

    def alone(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return F.linear(x, w)

    work = {"forward": {"flops": flops}, "backward": {"flops": 2 * flops}}
    functions = scale.both(ft.linear_add)
    functions["torch"] = lambda x, w, b, r: F.linear(x, w, b) + r
    functions["matmul alone"] = alone
    yield from forward_and_backward(scale, "linear_add", name, functions, inputs, **work)

    def both_outputs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        total = F.linear(x, w, b) + r
        return F.layer_norm(total, b.shape, b, b), total

    functions = scale.both(
        lambda x, w, b, r, **kw: ft.linear_add_layer_norm(x, w, b, r, b, b, **kw)
    )
    functions["torch"] = both_outputs
    functions["matmul alone"] = alone
    yield from forward_and_backward(scale, "linear_add_layer_norm", name, functions, inputs, **work)

    functions = scale.both(lambda *t, **kw: ft.linear_add(*t, dropout_p=0.1, **kw))
    functions["torch"] = lambda x, w, b, r: F.dropout(F.linear(x, w, b), 0.1) + r
    yield from forward_and_backward(
        scale, "linear_add", f"{name} dropout 0.1", functions, inputs, compared=False, **work
    )


# ---- models -------------------------------------------------------------------------------------

#: layers, features, heads, vocabulary: BERT-base, and GPT-2 small.
BERT, GPT2 = (12, 768, 12, 30522), (12, 768, 12, 50257)


def model_cases(scale: Scale) -> Iterator[Case]:
    """A BERT-base of transformers before and after ft.swap, and a decoder of GPT-2's size: forward,
    random weights, next to torch's SDPA."""
    if peer("transformers", "BertModel") is None:
        return
    for batch, length in scale.models:
        yield _model_case(scale, "BERT-base", BERT, batch, length)
        yield _model_case(scale, "decoder of GPT-2's size", GPT2, batch, length)


def _model_case(
    scale: Scale, name: str, sizes: tuple[int, int, int, int], batch: int, length: int
) -> Case:
    layers, features, heads, vocabulary = sizes
    decoder = sizes is GPT2
    if not scale.device.startswith("cuda"):
        layers = 1

    def build(whose: str) -> Candidate:
        import transformers

        ids = torch.randint(4, 30000, (batch, length), device=scale.device)
        with torch.device(scale.device):
            model: Any
            if not decoder:
                config = transformers.BertConfig(num_hidden_layers=layers)
                model = transformers.BertModel(config, add_pooling_layer=False)
            elif whose == OURS:
                from fasttransformer.models import LanguageModel

                model = LanguageModel(vocabulary, features, 4 * features, layers, heads)
            else:
                model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
        model = model.to(scale.device, BF16).eval()
        if whose == OURS and not decoder:
            ft.swap(model)

        def run() -> object:
            with torch.no_grad():
                return model(input_ids=ids)

        return run

    def make() -> dict[str, Candidate]:
        return {who: (lambda who=who: build(who)) for who in (OURS, "torch sdpa")}

    weights = layers * 12 * features**2 + (vocabulary * features if decoder else 0)
    scores = layers * 4 * length * features // (2 if decoder else 1)
    flops = batch * length * (2 * weights + scores)
    return Case(
        "models", f"{name} {batch}×{length}", BF16, make, flops=flops,
        device=scale.device, compared=False,  # other weights, or twelve layers of rounding
    )  # fmt: skip


# ---- selections ---------------------------------------------------------------------------------


def full_cases(scale: Scale) -> Iterator[Case]:
    yield from attention_cases(scale)
    yield from decode_cases(scale)
    yield from packed_cases(scale)
    yield from row_cases(scale)
    yield from linear_cases(scale)
    yield from model_cases(scale)


#: Names that a short selection takes: of attention each head size at the longest length, head size
#: 128 at a middle one too; of the others one size.
_SHORT_OPS = ("softmax", "layer_norm", "add_rms_norm", "cross_entropy")


def short_cases(scale: Scale) -> Iterator[Case]:
    """About thirty: ours on its first backend next to torch, for a run that mainly tests."""
    longest, middle = scale.lengths[:2]
    for head_dim in scale.head_dims:
        for length in (longest, middle) if head_dim == scale.head_dims[0] else (longest,):
            for causal in (False, True):
                yield from map(_without_second, _attention(scale, head_dim, length, causal))
    for case in _rows(scale, scale.elements // scale.columns[0], scale.columns[0]):
        if case.op.removesuffix(" backward") in _SHORT_OPS:
            yield _without_second(case)
    for case in _products(scale, *scale.products[0]):
        if "dropout" not in case.name:
            yield _without_second(case)
    yield from map(_without_second, decode_cases(scale))
    yield from list(model_cases(scale))[:1]


def _without_second(case: Case) -> Case:
    """Without our Triton candidate, which compiles for seconds a case."""
    return replace(case, make=lambda: {who: c for who, c in case.make().items() if who != TRITON})


SELECTIONS: dict[str, Callable[[Scale], Iterator[Case]]] = {
    "short": short_cases,
    "full": full_cases,
}

# ---- cost ---------------------------------------------------------------------------------------

#: Guesses for planning, not results: what a call reaches of a large GPU, in FLOP/s and bytes/s, and
#: the seconds that a candidate costs besides its calls (inputs, comparison, cuDNN's plans, the
#: construction of a model).
GUESSED_FLOPS, GUESSED_BYTES = 350e12, 2.5e12
AROUND, CUDNN_PLAN, MODEL = 0.08, 0.5, 2.0
BEFORE_FIRST = 14.0  # imports and ceilings


def estimated_seconds(case: Case, timed: float) -> float:
    """How long a case takes if each candidate is timed for ``timed`` seconds."""
    call = max(case.flops / GUESSED_FLOPS, case.bytes / GUESSED_BYTES)
    total = 0.0
    for who in case.make():
        # Two calls for the comparison, six before do_bench knows how many to make.
        total += 8 * call + max(timed, call) + AROUND
        total += CUDNN_PLAN if who == "torch cudnn" else 0.0
        total += MODEL if case.op == "models" else 0.0
    return total


def plan(cases: Iterator[Case], timed: float) -> str:
    """The estimate in words, an operation a line."""
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for case in cases:
        op = case.op.removesuffix(" backward")
        seconds[op] = seconds.get(op, 0.0) + estimated_seconds(case, timed)
        counts[op] = counts.get(op, 0) + 1
    lines = [f"{op}: {counts[op]} cases, {took:.0f} s" for op, took in seconds.items()]
    total = BEFORE_FIRST + sum(seconds.values())
    return "\n".join(
        [*lines, f"estimate: {total:.0f} s, {BEFORE_FIRST:.0f} s of them at the start"]
    )
