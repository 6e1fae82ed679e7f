"""softmax and log_softmax: plain, masked and backward, against torch and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference

from . import peers
from ._shared import OURS, SOFTMAX_FLOPS, Candidate, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 512), (4096, 768))
#: Some four million elements from 256 to 262,144 columns, and a few in cache.
FULL = (
    (8, 128), (64, 512), (16384, 256), (4096, 768), (4096, 1024), (1024, 4096), (256, 16384),
    (64, 65536), (16, 262144),
)  # fmt: skip
COLD = ((256, 4096),)


def _case(
    rows: int, columns: int, dtype: torch.dtype, op: str, mode: str, masked: bool, cold: bool
) -> Case:
    log = op == "log_softmax"
    ours: Callable[..., Tensor] = ft.log_softmax if log else ft.softmax
    wanted = reference.log_softmax if log else reference.softmax
    torchs = torch.log_softmax if log else torch.softmax

    def make() -> dict[str, Candidate]:
        x = randn(rows, columns, dtype=dtype, requires_grad=mode != "forward")
        if masked:
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.8
            functions: dict[str, Callable[..., Tensor]] = {
                OURS: lambda x: ours(x, mask=mask),
                "torch": lambda x: torchs(x.masked_fill(~mask, -float("inf")), -1),
            }
            return candidates(functions, [x], mode, lambda x: wanted(x, mask=mask))
        functions = {OURS: ours, "torch": lambda x: torchs(x, -1)}
        made = candidates(functions, [x], mode, wanted)
        if mode == "forward" and not log:
            made |= peers.present(onnxruntime=peers.onnx_softmax(x))
        return made

    size, arrays = rows * columns * dtype.itemsize, 2 if mode == "forward" else 3
    name = f"{rows}×{columns}" + " mask" * masked + ("" if mode == "forward" else f" {mode}")
    return Case(
        op, name, dtype, make, bytes=arrays * size + rows * columns * masked,
        flops=SOFTMAX_FLOPS * rows * columns, cold=cold,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    found = []
    for dtype in DTYPES:
        for size in QUICK if quick else FULL:
            found += [
                _case(*size, dtype, "softmax", "forward", False, False),
                _case(*size, dtype, "softmax", "backward", False, False),
            ]
            if quick and size != QUICK[0]:
                continue
            found += [
                _case(*size, dtype, "softmax", "forward", True, False),
                _case(*size, dtype, "log_softmax", "forward", False, False),
            ]
        found += [_case(*size, dtype, "softmax", "forward", False, True)
                  for size in COLD if not quick]  # fmt: skip
    return found


test_softmax = run_under_pytest
