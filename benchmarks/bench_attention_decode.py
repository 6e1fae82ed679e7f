"""attention_decode: a token against a cache, beside torch's attention over the same keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer.benchmarks._shared import OURS, Candidate, Case, randn, run_under_pytest

#: batch, heads, key heads, tokens in the cache, head_dim.
SHAPES = [(1, 32, 8, 16384, 128), (1, 32, 8, 2048, 128), (8, 8, 8, 256, 64), (32, 8, 8, 64, 64)]
DTYPES = (torch.float32, torch.bfloat16)


def _case(shape: tuple, dtype: torch.dtype) -> Case:
    batch, heads, kv_heads, length, dim = shape

    def make() -> dict[str, Candidate]:
        keys, values = (randn(1, batch, kv_heads, length, dim, dtype=dtype) for _ in "kv")
        lengths = torch.full((1, batch), length, dtype=torch.int32)
        cache = ft.KVCache(keys, values, lengths)
        query = randn(batch, heads, 1, dim, dtype=dtype)
        grouped = heads != kv_heads
        return {
            OURS: lambda: ft.attention_decode(query, cache),
            "torch": lambda: F.scaled_dot_product_attention(
                query, keys[0], values[0], enable_gqa=grouped
            ),
        }

    size = torch.finfo(dtype).bits // 8
    name = f"{batch}×{heads}/{kv_heads}×1×{length}×{dim}"
    return Case(
        "attention_decode", name, dtype, make, bytes=2 * batch * kv_heads * length * dim * size
    )


def cases(quick: bool = False) -> list[Case]:
    return [_case(shape, dtype) for shape in (SHAPES[1:] if quick else SHAPES) for dtype in DTYPES]


test_attention_decode = run_under_pytest
