"""Shapes that the benchmarks of the linear operations share: (rows, in, out), and where from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    forward_backward_of,
    randn,
)

#: MiniLM's and BERT base's output projections and second feed-forward linears, and a single query.
SHAPES = (
    (2048, 384, 384),
    (2048, 1536, 384),
    (2048, 768, 768),
    (2048, 3072, 768),
    (16, 768, 768),
    (1, 768, 768),
)
QUICK = ((2048, 384, 384), (16, 768, 768))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shapes(quick: bool) -> Iterator[tuple[int, int, int, torch.dtype]]:
    for dtype in DTYPES[: 2 if quick else 3]:
        for rows, inner, outer in QUICK if quick else SHAPES:
            yield rows, inner, outer, dtype


def operands(
    rows: int, inner: int, outer: int, dtype: torch.dtype, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input, weight (scaled as a trained layer's), bias, residual."""
    weight = (randn(outer, inner) / inner**0.5).to(dtype).requires_grad_(grad)
    return (
        randn(rows, inner, dtype=dtype, requires_grad=grad),
        weight,
        randn(outer, dtype=dtype, requires_grad=grad),
        randn(rows, outer, dtype=dtype, requires_grad=grad),
    )


def norm_cases(
    op: str, ours: Callable[..., Any], peer: Callable[..., Any], vectors: int, quick: bool
) -> list[Case]:
    """Cases of a projection that ends in a norm with so many ``vectors`` of weights."""
    found = []
    for rows, inner, outer, dtype in shapes(quick):
        size = (rows, inner, outer, dtype)

        def inputs(size=size, grad: bool = False) -> tuple[Tensor, ...]:
            _, _, outer, dtype = size
            norm = (randn(outer, dtype=dtype, requires_grad=grad) for _ in range(vectors))
            return (*operands(*size, grad=grad), *norm)

        def forward(inputs=inputs) -> Mapping[str, Candidate]:
            given = inputs()
            return {OURS: lambda: ours(*given), "torch": lambda: peer(*given)}

        def train(inputs=inputs) -> Mapping[str, Candidate]:
            given = inputs(grad=True)
            return {
                OURS: forward_backward_of(ours, *given),
                "torch": forward_backward_of(peer, *given),
            }

        name, flops = f"{rows}×{inner}→{outer}", 2 * rows * inner * outer
        found.append(Case(op, name, dtype, forward, flops=flops))
        if rows > 16:
            found.append(Case(op, f"{name} forward + backward", dtype, train, flops=3 * flops))
    return found
