"""softmax and log_softmax: plain, masked, causal and backward, against torch."""

from __future__ import annotations

import torch

import fasttransformer as ft

from ._shared import OURS, Case, backward_of, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 512), (4096, 768))
FULL = ((8, 128), (4096, 64), (64, 512), (4096, 768), (256, 4096), (16, 65536), (4, 262144))


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, columns in QUICK if quick else FULL:
        for dtype in DTYPES:
            size = rows * columns * dtype.itemsize

            def plain(rows=rows, columns=columns, dtype=dtype, grad=False):
                return randn(rows, columns, dtype=dtype, requires_grad=grad)

            def softmax(plain=plain):
                x = plain()
                return {OURS: lambda: ft.softmax(x), "torch": lambda: torch.softmax(x, -1)}

            def log_softmax(plain=plain):
                x = plain()
                return {OURS: lambda: ft.log_softmax(x), "torch": lambda: torch.log_softmax(x, -1)}

            def masked(plain=plain):
                x = plain()
                mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.8
                return {
                    OURS: lambda: ft.softmax(x, mask=mask),
                    "torch": lambda: torch.softmax(x.masked_fill(~mask, -float("inf")), -1),
                }

            def backward(plain=plain):
                x = plain(grad=True)
                return {
                    OURS: backward_of(ft.softmax, x),
                    "torch": backward_of(lambda x: torch.softmax(x, -1), x),
                }

            shape = f"{rows}×{columns}"
            found += [
                Case("softmax", shape, dtype, softmax, bytes=2 * size),
                Case("log_softmax", shape, dtype, log_softmax, bytes=2 * size),
                Case("softmax", f"{shape} mask", dtype, masked, bytes=2 * size + rows * columns),
                Case("softmax", f"{shape} backward", dtype, backward, bytes=3 * size),
            ]
    return found


test_softmax = run_under_pytest
