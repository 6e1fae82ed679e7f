"""rotary_embedding: half-split and interleaved pairs, and backward, against plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import fasttransformer as ft

from ._shared import OURS, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((1, 8, 2, 256, 64),)
FULL = ((4, 32, 8, 2048, 128), (16, 12, 12, 512, 64))


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models write it, with tables of the angles twice."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def cases(quick: bool = False) -> list[Case]:
    found = []
    for batch, heads, kv_heads, length, head_dim in QUICK if quick else FULL:
        for dtype in DTYPES:
            size = batch * (heads + kv_heads) * length * head_dim * dtype.itemsize

            def inputs(
                shape=(batch, heads, kv_heads, length, head_dim), dtype=dtype, grad=False
            ):  # fmt: skip
                batch, heads, kv_heads, length, head_dim = shape
                # As a projection leaves them: (batch, length, heads, head_dim) in memory.
                query, key = (
                    randn(batch, length, h, head_dim, dtype=dtype).transpose(1, 2)
                    for h in (heads, kv_heads)
                )
                angle = torch.outer(
                    torch.arange(length), 1e4 ** -torch.linspace(0, 1, head_dim // 2)
                )
                tables = [t.to(dtype) for t in (angle.cos(), angle.sin())]
                return query.requires_grad_(grad), key.requires_grad_(grad), *tables

            def halves(inputs=inputs):
                query, key, cos, sin = inputs()
                wide = [torch.cat([t, t], -1) for t in (cos, sin)]
                functions = {
                    OURS: lambda q, k: ft.rotary_embedding(q, k, cos, sin),
                    "torch": lambda q, k: (_halves(q, *wide), _halves(k, *wide)),
                }
                return candidates(functions, [query, key])

            def interleaved(inputs=inputs):
                args = inputs()
                return {OURS: lambda: ft.rotary_embedding(*args, interleaved=True)}

            def backward(inputs=inputs):
                query, key, cos, sin = inputs(grad=True)
                wide = [torch.cat([t, t], -1) for t in (cos, sin)]
                functions = {
                    OURS: lambda q, k: ft.rotary_embedding(q, k, cos, sin),
                    "torch": lambda q, k: (_halves(q, *wide), _halves(k, *wide)),
                }
                return candidates(functions, [query, key], "backward")

            # Three flops a number: two products and a sum.
            work = {"bytes": 2 * size, "flops": 3 * size // dtype.itemsize}
            shape = f"{batch}×{heads}+{kv_heads}×{length}×{head_dim}"
            found += [
                Case("rotary_embedding", shape, dtype, halves, **work),
                Case("rotary_embedding", f"{shape} pairs", dtype, interleaved, **work),
                Case("rotary_embedding", f"{shape} backward", dtype, backward, **work),
            ]
    return found


test_rotary_embedding = run_under_pytest
