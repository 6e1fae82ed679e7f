"""cross_entropy: plain, with label smoothing, and backward, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference

from ._shared import OURS, SOFTMAX_FLOPS, Candidate, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 1000), (256, 32000))
FULL = ((4096, 1000), (512, 32000), (512, 50257), (256, 131072), (128, 262144))


def _case(rows: int, classes: int, dtype: torch.dtype, mode: str, smoothing: float) -> Case:
    def make() -> dict[str, Candidate]:
        target = torch.arange(rows) * 7919 % classes
        x = randn(rows, classes, dtype=dtype, requires_grad=mode != "forward")
        functions = {
            OURS: lambda x: ft.cross_entropy(x, target, label_smoothing=smoothing),
            "torch": lambda x: F.cross_entropy(x, target, label_smoothing=smoothing),
        }
        return candidates(
            functions, [x], mode,
            lambda x: reference.cross_entropy(x, target, label_smoothing=smoothing),
        )  # fmt: skip

    name = f"{rows}×{classes}" + " smoothing" * bool(smoothing)
    return Case(
        "cross_entropy", name if mode == "forward" else f"{name} {mode}", dtype, make,
        bytes=rows * classes * dtype.itemsize * (1 if mode == "forward" else 2),
        flops=SOFTMAX_FLOPS * rows * classes,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    kinds = [("forward", 0.0), ("forward", 0.1), ("backward", 0.0)]
    return [
        _case(*size, dtype, mode, smoothing)
        for size in (QUICK if quick else FULL)
        for dtype in DTYPES
        for mode, smoothing in (kinds[::2] if quick else kinds)
    ]


test_cross_entropy = run_under_pytest
