"""attention_varlen, forward and backward, beside torch on the padded batch with its mask."""

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

#: Name, lengths of the sequences; heads of 64 as in the models.
BATCHES = {
    "sentences": [9, 31, 14, 22, 47, 12, 18, 64, 27, 35, 11, 20, 16, 29, 40, 25],
    "documents": [512, 130, 377, 64, 241, 96, 320, 180],
}
HEADS, DIM = 8, 64
DTYPES = (torch.float32, torch.bfloat16)


def _case(name: str, lengths: list[int], dtype: torch.dtype, backward: bool) -> Case:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = real[:, None, None, :]

    def ours(*packed: Tensor) -> Tensor:
        return ft.attention_varlen(*packed, bounds, bounds)

    def padded(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask)

    def make() -> dict[str, Candidate]:
        packed = [randn(sum(lengths), HEADS, DIM, dtype=dtype).requires_grad_(backward)
                  for _ in range(3)]  # fmt: skip
        full = [
            randn(len(lengths), longest, HEADS, DIM, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_(backward)
            for _ in range(3)
        ]
        if backward:
            return {OURS: backward_of(ours, *packed), "torch padded": backward_of(padded, *full)}
        return {OURS: lambda: ours(*packed), "torch padded": lambda: padded(*full)}

    flops = sum(n * n for n in lengths) * HEADS * DIM * (10 if backward else 4)
    op = "attention_varlen backward" if backward else "attention_varlen"
    size = 4 * sum(lengths) * HEADS * DIM * dtype.itemsize * (2 if backward else 1)
    return Case(
        op, f"{name}, {len(lengths)} of {min(lengths)}…{longest}", dtype, make, bytes=size,
        flops=flops, compared=False,  # one result has padding
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    batches = dict(list(BATCHES.items())[:1]) if quick else BATCHES
    return [
        _case(name, lengths, dtype, backward)
        for name, lengths in batches.items()
        for dtype in DTYPES
        for backward in (False, True)
    ]


test_attention_varlen = run_under_pytest
