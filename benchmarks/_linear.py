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
    candidates,
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


def linear_bytes(rows: int, inner: int, outer: int, dtype: torch.dtype) -> int:
    """Input, weight, residual and output, each once."""
    return (rows * inner + inner * outer + 2 * rows * outer) * dtype.itemsize


def norm_cases(
    op: str,
    functions: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    vectors: int,
    quick: bool,
) -> list[Case]:
    """Cases of a projection that ends in a norm with so many ``vectors`` of weights; the functions
    are ours, torch's and the reference."""
    ours, peer, wanted = functions
    found = []
    for rows, inner, outer, dtype in shapes(quick):
        size = (rows, inner, outer, dtype)

        def inputs(size=size, grad: bool = False) -> tuple[Tensor, ...]:
            _, _, outer, dtype = size
            norm = (randn(outer, dtype=dtype, requires_grad=grad) for _ in range(vectors))
            return (*operands(*size, grad=grad), *norm)

        def forward(inputs=inputs) -> Mapping[str, Candidate]:
            return candidates({OURS: ours, "torch": peer}, inputs(), "forward", wanted)

        def train(inputs=inputs) -> Mapping[str, Candidate]:
            given = inputs(grad=True)
            return candidates({OURS: ours, "torch": peer}, given, "forward + backward", wanted)

        name, flops = f"{rows}×{inner}→{outer}", 2 * rows * inner * outer
        size = linear_bytes(rows, inner, outer, dtype)
        found.append(Case(op, name, dtype, forward, bytes=size, flops=flops))
        if rows > 16:
            found.append(Case(op, f"{name} forward + backward", dtype, train, bytes=3 * size,
                              flops=3 * flops))  # fmt: skip
    return found
