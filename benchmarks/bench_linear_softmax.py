"""linear_softmax: the probabilities of an output layer, beside torch's pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer.benchmarks._shared import OURS, Candidate, Case, randn, run_under_pytest

#: (rows, features, classes): a step of generation, and a batch of a classifier's or a decoder's.
SHAPES = ((1, 512, 32000), (32, 512, 32000), (1024, 512, 8192), (4096, 384, 1000))
QUICK = ((1, 512, 8192), (256, 256, 8192))
DTYPES = (torch.float32, torch.bfloat16)


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, features, classes in QUICK if quick else SHAPES:
        for dtype in DTYPES:

            def make(
                rows=rows, features=features, classes=classes, dtype=dtype
            ) -> Mapping[str, Candidate]:
                x, weight = (randn(n, features, dtype=dtype) for n in (rows, classes))
                return {
                    OURS: lambda: ft.linear_softmax(x, weight, temperature=0.7),
                    "torch": lambda: torch.softmax(F.linear(x, weight) / 0.7, -1),
                }

            name, flops = f"{rows}×{features}→{classes}", 2 * rows * features * classes
            size = classes * features * dtype.itemsize if rows <= 8 else 0
            bound = {"bytes": size} if size else {"flops": flops}
            found.append(Case("linear_softmax", name, dtype, make, **bound))
    return found


test_linear_softmax = run_under_pytest
