"""cross_entropy: plain, with label smoothing, and backward, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fasttransformer as ft

from ._shared import OURS, Case, backward_of, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((64, 1000), (256, 32000))
FULL = ((4096, 1000), (512, 32000), (512, 50257), (256, 131072))


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, classes in QUICK if quick else FULL:
        for dtype in DTYPES:
            size = rows * classes * dtype.itemsize

            def inputs(rows=rows, classes=classes, dtype=dtype, grad=False):
                target = torch.arange(rows) * 7919 % classes
                return randn(rows, classes, dtype=dtype, requires_grad=grad), target

            def plain(inputs=inputs):
                x, target = inputs()
                return {
                    OURS: lambda: ft.cross_entropy(x, target),
                    "torch": lambda: F.cross_entropy(x, target),
                }

            def smooth(inputs=inputs):
                x, target = inputs()
                return {
                    OURS: lambda: ft.cross_entropy(x, target, label_smoothing=0.1),
                    "torch": lambda: F.cross_entropy(x, target, label_smoothing=0.1),
                }

            def backward(inputs=inputs):
                x, target = inputs(grad=True)
                return {
                    OURS: backward_of(lambda x: ft.cross_entropy(x, target), x),
                    "torch": backward_of(lambda x: F.cross_entropy(x, target), x),
                }

            shape = f"{rows}×{classes}"
            found += [
                Case("cross_entropy", shape, dtype, plain, bytes=size),
                Case("cross_entropy", f"{shape} smoothing", dtype, smooth, bytes=size),
                Case("cross_entropy", f"{shape} backward", dtype, backward, bytes=2 * size),
            ]
    return found


test_cross_entropy = run_under_pytest
