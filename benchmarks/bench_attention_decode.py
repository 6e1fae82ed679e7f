"""attention_decode: a token against a cache of 1k to 128k, beside torch's attention over the same
keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference

from ._shared import OURS, REFERENCE, Candidate, Case, randn, run_under_pytest

#: batch, heads, key heads, tokens in the cache, head_dim.
CONTEXTS = [(1, 32, 8, length << 10, 128) for length in (1, 4, 16, 64, 128)]
SHORT = [(8, 8, 8, 256, 64), (32, 8, 8, 64, 64)]
QUICK = [(1, 32, 8, 2048, 128), (8, 8, 8, 256, 64)]
DTYPES = (torch.float32, torch.bfloat16)


def _case(shape: tuple, dtype: torch.dtype) -> Case:
    batch, heads, kv_heads, length, dim = shape

    def make() -> dict[str, Candidate]:
        keys = randn(1, batch, kv_heads, length, dim, dtype=dtype)
        values = keys.flip(3)
        lengths = torch.full((1, batch), length, dtype=torch.int32)
        cache = ft.KVCache(keys, values, lengths)
        query = randn(batch, heads, 1, dim, dtype=dtype)
        grouped = heads != kv_heads

        def wanted() -> Tensor:
            return reference.attention(query.double(), keys[0].double(), values[0].double())

        made: dict[str, Candidate] = {
            OURS: lambda: ft.attention_decode(query, cache),
            "torch sdpa": lambda: F.scaled_dot_product_attention(
                query, keys[0], values[0], enable_gqa=grouped
            ),
        }
        return made | ({REFERENCE: wanted} if length <= 16384 else {})

    return Case(
        "attention_decode", f"{batch}×{heads}/{kv_heads}×1×{length}×{dim}", dtype, make,
        bytes=2 * batch * kv_heads * length * dim * dtype.itemsize,
        flops=4 * batch * heads * length * dim,
        along=("32/8 heads of 128", length) if shape in CONTEXTS else None,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    return [_case(s, dtype) for s in (QUICK if quick else CONTEXTS + SHORT) for dtype in DTYPES]


test_attention_decode = run_under_pytest
