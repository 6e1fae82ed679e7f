"""linear_topk: the best classes of a few rows (a step of generation) and of many, beside torch's
product, softmax and topk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer.benchmarks._shared import OURS, Candidate, Case, randn, run_under_pytest

#: (rows, features, classes, k).
SHAPES = (
    (1, 512, 32000, 50),
    (4, 512, 32000, 50),
    (8, 512, 32000, 50),
    (32, 512, 32000, 50),
    (1, 768, 50257, 50),
    (1, 512, 128256, 50),
    (1, 512, 262144, 50),
    (1024, 512, 32000, 8),
)
QUICK = ((1, 512, 8192, 50), (32, 512, 8192, 4))
DTYPES = (torch.float32, torch.bfloat16)


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, features, classes, k in QUICK if quick else SHAPES:
        for dtype in DTYPES:

            def make(
                rows=rows, features=features, classes=classes, k=k, dtype=dtype
            ) -> Mapping[str, Candidate]:
                x, weight = (randn(n, features, dtype=dtype) for n in (rows, classes))
                weight *= 0.05  # no probability is lost to rounding beside the largest
                return {
                    OURS: lambda: ft.linear_topk(x, weight, k=k),
                    "torch": lambda: torch.topk(torch.softmax(F.linear(x, weight), -1), k),
                }

            name = f"{rows}×{features}→{classes} k {k}"
            size = (rows + classes) * features * dtype.itemsize
            flops = 2 * rows * features * classes
            # Equal values may come in another order.
            found.append(
                Case("linear_topk", name, dtype, make, bytes=size, flops=flops, compared=False)
            )
    return found


test_linear_topk = run_under_pytest
