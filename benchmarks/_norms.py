"""The cases of the norms' benchmarks: one grid of sizes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ._shared import OURS, Case, backward_of, randn

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 768), (4096, 768))
FULL = ((8, 128), (4096, 64), (64, 768), (512, 768), (4096, 768), (512, 4096), (64, 16384))


def norm_cases(
    op: str,
    ours: Callable,
    torchs: Callable,
    *,
    adds: bool,
    bias: bool,
    quick: bool,
) -> list[Case]:
    """Forward and backward over the grid. ``ours`` and ``torchs`` take the input, the residual if
    there is one, and the vectors."""
    found = []
    for rows, features in QUICK if quick else FULL:
        for dtype in DTYPES:
            size = rows * features * dtype.itemsize

            def inputs(rows=rows, features=features, dtype=dtype, grad=False) -> list:
                rowwise = [randn(rows, features, dtype=dtype, requires_grad=grad)]
                rowwise += [randn(rows, features, dtype=dtype, requires_grad=grad)] * adds
                vectors = [randn(features, dtype=dtype, requires_grad=grad)]
                return rowwise + vectors * (2 if bias else 1)

            def forward(inputs=inputs) -> Mapping[str, Callable]:
                tensors = inputs()
                return {OURS: lambda: ours(*tensors), "torch": lambda: torchs(*tensors)}

            def backward(inputs=inputs) -> Mapping[str, Callable]:
                tensors = inputs(grad=True)
                return {OURS: backward_of(ours, *tensors), "torch": backward_of(torchs, *tensors)}

            shape = f"{rows}×{features}"
            # Forward: rows in and out. Backward: gradients and rows in, the rows' gradient out.
            found.append(Case(op, shape, dtype, forward, bytes=(4 if adds else 2) * size))
            found.append(
                Case(op, f"{shape} backward", dtype, backward, bytes=(4 if adds else 3) * size)
            )
    return found
