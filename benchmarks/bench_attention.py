"""attention, forward and backward, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    backward_of,
    randn,
    run_under_pytest,
)

#: batch, heads, length, head_dim, causal; the last three are MiniLM's (12 heads of 32).
SHAPES = [
    (1, 8, 512, 64, False),
    (1, 8, 2048, 64, False),
    (1, 8, 2048, 128, False),
    (1, 8, 2048, 64, True),
    (1, 8, 2048, 128, True),
    (1, 12, 16, 32, False),
    (16, 12, 128, 32, False),
    (8, 12, 512, 32, False),
]
DTYPES = (torch.float32, torch.bfloat16)


def _inputs(shape: tuple, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """Views as models make them: (batch, length, heads, head_dim), transposed."""
    batch, heads, length, dim, _ = shape
    return [
        randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_(grad)
        for _ in range(3)
    ]


def _case(shape: tuple, dtype: torch.dtype, backward: bool) -> Case:
    batch, heads, length, dim, causal = shape

    def ours(*inputs: Tensor) -> Tensor:
        return ft.attention(*inputs, is_causal=causal)

    def torchs(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=causal)

    def make() -> dict[str, Candidate]:
        inputs = _inputs(shape, dtype, backward)
        if backward:
            return {OURS: backward_of(ours, *inputs), "torch": backward_of(torchs, *inputs)}
        return {OURS: lambda: ours(*inputs), "torch": lambda: torchs(*inputs)}

    scores = batch * heads * length * ((length + 1) / 2 if causal else length)
    name = f"{batch}×{heads}×{length}×{dim}" + (" causal" if causal else "")
    return Case(
        "attention backward" if backward else "attention",
        name,
        dtype,
        make,
        flops=int(scores * dim * (10 if backward else 4)),
    )


def cases(quick: bool = False) -> list[Case]:
    shapes = [s for s in SHAPES if s[2] <= 512] if quick else SHAPES
    found = [_case(shape, dtype, False) for shape in shapes for dtype in DTYPES]
    return found + [_case(shape, torch.float32, True) for shape in shapes if shape[2] <= 512]


test_attention = run_under_pytest
