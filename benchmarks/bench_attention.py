"""attention, forward and backward, beside torch's ways to it, FlexAttention and onnxruntime.

Lengths from 512 to 16k as in the FlashAttention papers (arXiv:2205.14135, 2307.08691), with as many
heads as a CPU does in a second; grouped heads, a bias, and the many short sequences of sentence
encoders beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference

from . import peers
from ._shared import OURS, Candidate, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
#: Score matrices of at most so many numbers are computed in float64, and by peers that store them.
STORED = 1 << 26


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool = False
    kv_heads: int = 0  # 0: as many as heads
    bias: bool = False
    curve: bool = False  # part of the curve over length

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        marks = " causal" * self.causal + " bias" * self.bias
        return f"{self.batch}×{heads}×{self.length}×{self.dim}{marks}"

    @property
    def stored(self) -> bool:
        return self.batch * self.heads * self.length**2 <= STORED


QUICK = (
    Shape(1, 8, 512, 64), Shape(1, 8, 512, 64, True), Shape(1, 12, 16, 32),
    Shape(16, 12, 128, 64), Shape(8, 12, 512, 32),
)  # fmt: skip
FULL = (
    *(Shape(1, 8, length, dim, causal, curve=True)
      for dim in (64, 128) for causal in (False, True) for length in (512, 1024, 2048, 4096)),
    Shape(1, 8, 2048, 256), Shape(1, 2, 16384, 64, True),
    Shape(1, 32, 1024, 128, True, 8), Shape(1, 8, 1024, 64, bias=True),
    Shape(1, 12, 16, 32), Shape(16, 12, 128, 64), Shape(16, 12, 128, 32), Shape(8, 12, 512, 32),
)  # fmt: skip


def _inputs(shape: Shape, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """Views as models make them: (batch, length, heads, head_dim), transposed."""
    kv_heads = shape.kv_heads or shape.heads
    made = [
        randn(shape.batch, shape.length, heads, shape.dim, dtype=dtype).flip(0, i).transpose(1, 2)
        for i, heads in ((1, shape.heads), (2, kv_heads), (3, kv_heads))
    ]
    made = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(grad) for x in made]
    if shape.bias:
        made.append(randn(1, shape.heads, shape.length, shape.length, dtype=dtype))
    return made


def _case(shape: Shape, dtype: torch.dtype, mode: str, quick: bool) -> Case:
    causal = shape.causal

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return ft.attention(q, k, v, bias=bias, is_causal=causal)

    def wanted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.attention(q, k, v, bias=bias, is_causal=causal)

    def make() -> dict[str, Candidate]:
        inputs = _inputs(shape, dtype, mode != "forward")
        functions: dict[str, Callable[..., Tensor]] = {OURS: ours}
        functions |= peers.attention(causal, bool(shape.kv_heads))
        if not shape.stored or quick:
            functions = {n: f for n, f in functions.items() if n in (OURS, "torch sdpa")}
        made = candidates(functions, inputs, mode, wanted if shape.stored else None)
        if mode == "forward" and not shape.bias:
            if shape.stored:
                made |= peers.present(onnxruntime=peers.onnx_attention(*inputs, causal))
            if not quick and shape.length == 2048 and shape.dim == 64:
                made |= peers.present(FlexAttention=peers.flex_attention(*inputs, causal))
        return made

    pairs = shape.length * ((shape.length + 1) / 2 if causal else shape.length)
    per_pair = {"forward": 4, "backward": 10, "forward + backward": 14}[mode]
    kv_heads = shape.kv_heads or shape.heads
    rows = shape.batch * shape.length * (2 * shape.heads + 2 * kv_heads)
    title = f"head size {shape.dim}" + ", causal" * causal
    return Case(
        "attention" if mode == "forward" else f"attention {mode}", shape.name, dtype, make,
        flops=int(shape.batch * shape.heads * pairs * shape.dim * per_pair),
        bytes=rows * shape.dim * dtype.itemsize * (1 if mode == "forward" else 2),
        along=(title, shape.length) if shape.curve else None,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    if quick:
        found = [_case(shape, dtype, "forward", True) for shape in QUICK for dtype in DTYPES]
        return found + [_case(shape, torch.float32, "backward", True) for shape in QUICK[:4]]
    found = [_case(shape, dtype, "forward", False) for shape in FULL for dtype in DTYPES]
    for shape in FULL:
        if shape.curve and (shape.dim != 64 or shape.length > 2048):
            continue
        if shape.length > 4096:
            continue
        found += [_case(shape, dtype, "backward", False) for dtype in DTYPES]
    found.append(_case(FULL[1], torch.float32, "forward + backward", False))
    return found


test_attention = run_under_pytest
