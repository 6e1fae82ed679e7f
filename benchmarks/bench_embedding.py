"""embedding: tokens alone, with sinusoids, and the table's gradient, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fasttransformer as ft

from ._shared import OURS, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((1024, 30522, 384),)
FULL = ((8192, 30522, 384), (8192, 32000, 4096))


def cases(quick: bool = False) -> list[Case]:
    found = []
    for tokens, rows, features in QUICK if quick else FULL:
        for dtype in DTYPES:
            row = features * dtype.itemsize

            def inputs(tokens=tokens, rows=rows, features=features, dtype=dtype, grad=False):
                ids = (torch.rand(8, tokens // 8, generator=torch.Generator().manual_seed(0)) ** 4
                       * rows).long()  # few ids are frequent, as in text  # fmt: skip
                return ids, randn(rows, features, dtype=dtype, requires_grad=grad)

            def plain(inputs=inputs):
                ids, weight = inputs()
                functions = {
                    OURS: lambda w: ft.embedding(ids, w),
                    "torch": lambda w: F.embedding(ids, w),
                }
                return candidates(functions, [weight], "forward", lambda w: w[ids])

            def sinusoidal(inputs=inputs):
                ids, weight = inputs()
                table = ft.embedding(
                    torch.zeros(ids.shape[1], dtype=torch.int64), 0 * weight[:1], sinusoidal=True
                )
                return {
                    OURS: lambda: ft.embedding(ids, weight, sinusoidal=True, scale=8.0),
                    "torch": lambda: F.embedding(ids, weight) * 8.0 + table,
                }

            def backward(inputs=inputs):
                ids, weight = inputs(grad=True)
                functions = {
                    OURS: lambda w: ft.embedding(ids, w),
                    "torch": lambda w: F.embedding(ids, w),
                }
                return candidates(functions, [weight], "backward", lambda w: w[ids])

            shape = f"{tokens} of {rows}×{features}"
            bytes_ = 2 * tokens * row
            found += [
                Case("embedding", shape, dtype, plain, bytes=bytes_, flops=tokens * features),
                Case("embedding", f"{shape} sinusoidal", dtype, sinusoidal, bytes=bytes_,
                     flops=3 * tokens * features),
                Case("embedding", f"{shape} backward", dtype, backward,
                     bytes=(tokens + rows) * row, flops=tokens * features),
            ]  # fmt: skip
    return found


test_embedding = run_under_pytest
