"""linear_softmax: the probabilities of an output layer, beside torch's pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

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

#: (rows, features, classes): a step of generation, and a batch of a classifier's or a decoder's.
SHAPES = (
    (1, 512, 32000), (1, 512, 262144), (32, 512, 32000), (32, 512, 128256), (1024, 512, 8192),
    (4096, 384, 1000),
)  # fmt: skip
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
                weight *= 0.05
                functions = {
                    OURS: lambda x, w: ft.linear_softmax(x, w, temperature=0.7),
                    "torch": lambda x, w: torch.softmax(F.linear(x, w) / 0.7, -1),
                }
                return candidates(
                    functions, [x, weight], "forward",
                    lambda x, w: reference.linear_softmax(x, w, temperature=0.7),
                )  # fmt: skip

            name, flops = f"{rows}×{features}→{classes}", 2 * rows * features * classes
            size = (classes * features + rows * (features + classes)) * dtype.itemsize
            found.append(Case("linear_softmax", name, dtype, make, bytes=size, flops=flops))
    return found


test_linear_softmax = run_under_pytest
