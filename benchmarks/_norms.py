"""The cases of the norms' benchmarks: one grid of sizes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._shared import NORM_FLOPS, OURS, Candidate, Case, candidates, randn

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 768), (4096, 768))
#: Some four million elements from 256 to 262,144 features, and a few in cache.
FULL = (
    (8, 128), (64, 768), (16384, 256), (4096, 768), (1024, 4096), (256, 16384), (64, 65536),
    (16, 262144),
)  # fmt: skip
COLD = ((512, 4096),)


def norm_cases(
    op: str,
    functions: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    *,
    adds: bool,
    bias: bool,
    quick: bool,
    onnx: Callable[..., dict[str, Candidate]] | None = None,
) -> list[Case]:
    """Forward and backward over the grid. The functions, ours, torch's and the reference, take the
    input, the residual if there is one, and the vectors; ``onnx`` makes more peers of the same."""
    ours, torchs, wanted = functions

    def case(rows: int, features: int, dtype: torch.dtype, mode: str, cold: bool = False) -> Case:
        def make() -> dict[str, Candidate]:
            grad = mode != "forward"

            def drawn(*shape: int) -> Tensor:
                return randn(*shape, dtype=dtype, requires_grad=grad)

            inputs = [drawn(rows, features)]
            if adds:
                inputs.append(drawn(rows, features).detach().flip(0).requires_grad_(grad))
            inputs += [drawn(features) for _ in range(2 if bias else 1)]
            made = candidates({OURS: ours, "torch": torchs}, inputs, mode, wanted)
            if onnx is not None and not grad:
                made |= onnx(*inputs)
            return made

        # Forward: rows in and out. Backward: gradients and rows in, the rows' gradient out.
        arrays = 4 if adds else 2 if mode == "forward" else 3
        return Case(
            op, f"{rows}×{features}" + ("" if mode == "forward" else f" {mode}"), dtype, make,
            bytes=arrays * rows * features * dtype.itemsize, flops=NORM_FLOPS * rows * features,
            cold=cold,
        )  # fmt: skip

    found = []
    for size in QUICK if quick else FULL:
        found += [case(*size, dtype, mode) for dtype in DTYPES for mode in ("forward", "backward")]
    if not quick:
        found += [case(*size, dtype, "forward", True) for size in COLD for dtype in DTYPES]
    return found
