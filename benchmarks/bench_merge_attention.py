"""merge_attention, forward and backward, beside the same sum in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    candidates,
    randn,
    run_under_pytest,
)

#: parts, batch, heads, queries, value_dim.
SHAPES = [(4, 1, 8, 512, 64), (8, 1, 32, 1024, 128)]
DTYPES = (torch.float32, torch.bfloat16)


def _torchs(outs: Tensor, lses: Tensor) -> Tensor:
    return (torch.softmax(lses, 0).unsqueeze(-1) * outs).sum(0).to(outs.dtype)


def _wanted(outs: Tensor, lses: Tensor) -> Tensor:
    return reference.merge_attention(outs, lses)[0]


def _ours(outs: Tensor, lses: Tensor) -> Tensor:
    return ft.merge_attention(outs, lses)[0]


def _case(shape: tuple, dtype: torch.dtype, backward: bool) -> Case:
    def make() -> dict[str, Candidate]:
        inputs = [
            randn(*shape, dtype=dtype).requires_grad_(backward),
            randn(*shape[:-1], dtype=torch.float32).requires_grad_(backward),
        ]
        mode = "backward" if backward else "forward"
        return candidates({OURS: _ours, "torch": _torchs}, inputs, mode, _wanted)

    parts, rows = shape[0], torch.Size(shape[1:]).numel()
    size = rows * torch.finfo(dtype).bits // 8
    moved = size * (2 * parts + 1 if backward else parts + 1)
    op = "merge_attention backward" if backward else "merge_attention"
    return Case(op, "×".join(map(str, shape)), dtype, make, bytes=moved,
                flops=2 * parts * rows)  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    shapes = SHAPES[:1] if quick else SHAPES
    return [_case(s, dtype, b) for s in shapes for dtype in DTYPES for b in (False, True)]


test_merge_attention = run_under_pytest
