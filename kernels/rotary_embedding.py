"""Rotary position embedding of query and key in one launch, and the way back.

    (a, b) → (a · cos − b · sin, b · cos + a · sin)      pairs (i, i + half), or (2i, 2i + 1)

A program owns a tile of a sequence's tokens for HEADS heads: the angles are read once for them.
The heads of query and of key are one row of heads. Interleaved pairs are loaded as they lie and
taken apart in registers. Backward is the same kernel with the sines negated. Bound: memory
bandwidth; the tables are small and come from the cache. Source: Su et al., RoFormer, 2021
(arXiv:2104.09864).
"""

import triton
import triton.language as tl
from torch import Tensor

from ._register import operator

# Not measured: 8 pairs a thread, so two 16-byte loads of 16-bit rows for each head.
PAIRS, HEADS, WARPS = 1024, 4, 4


@triton.jit
def _turn(
    x_ptr, out_ptr, heads, head, batch, position, length, half, steps, column, cos, sin, inside,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head's tile, (TOKENS, HALF) pairs."""
    x_ptr += batch * steps[0] + head * steps[1] + position[:, None] * steps[2]
    out_ptr += ((batch * heads + head) * length + position)[:, None] * (2 * half)
    kind = out_ptr.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        within = (position < length)[:, None] & (both < 2 * half)
        x = tl.load(x_ptr + both, mask=within, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (TOKENS, HALF, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = tl.reshape(turned, (TOKENS, 2 * HALF))
        tl.store(out_ptr + both, turned.to(kind), mask=within)
    else:
        a = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, (a * cos - b * sin).to(kind), mask=inside)
        tl.store(out_ptr + half + column, (b * cos + a * sin).to(kind), mask=inside)


@triton.jit
def _rotate(
    query_ptr, key_ptr, cos_ptr, sin_ptr, ids_ptr, query_out_ptr, key_out_ptr,
    query_heads, key_heads, length, half, query_steps, key_steps, cos_steps, sin_steps, ids_step,
    sign, head_groups, tiles,
    HAS_IDS: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = (program % head_groups) * HEADS
    rest = program // head_groups
    batch = (rest // tiles).to(tl.int64)
    position = (rest % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, HALF)[None, :]
    inside = (position < length)[:, None] & (column < half)
    row = position
    if HAS_IDS:
        row = tl.load(ids_ptr + batch * ids_step + position, mask=position < length, other=0)
        row = row.to(tl.int64)
    at = batch * cos_steps[0] + row[:, None] * cos_steps[1] + column
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = batch * sin_steps[0] + row[:, None] * sin_steps[1] + column
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32) * sign
    for i in tl.static_range(HEADS):
        head = (first + i).to(tl.int64)
        if head < query_heads:
            _turn(
                query_ptr, query_out_ptr, query_heads, head, batch, position, length, half,
                query_steps, column, cos, sin, inside, INTERLEAVED, TOKENS, HALF,
            )  # fmt: skip
        elif head < query_heads + key_heads:
            _turn(
                key_ptr, key_out_ptr, key_heads, head - query_heads, batch, position, length, half,
                key_steps, column, cos, sin, inside, INTERLEAVED, TOKENS, HALF,
            )  # fmt: skip


def _table_steps(table: Tensor) -> tuple[int, int]:
    """(batch stride, row stride); a batch of 1 serves every sample."""
    by_batch = table.dim() == 3 and table.shape[0] > 1
    return table.stride(0) if by_batch else 0, table.stride(-2)


def _rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    position_ids: Tensor | None, sign: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    batch, query_heads, length, head_dim = query.shape
    key_heads, half = key.shape[1], head_dim // 2
    if outs[0].numel() + outs[1].numel() == 0:
        return outs
    block = max(16, triton.next_power_of_2(half))
    tokens = min(max(1, PAIRS // block), triton.next_power_of_2(length))
    head_groups, tiles = triton.cdiv(query_heads + key_heads, HEADS), triton.cdiv(length, tokens)
    ids_step = 0
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] > 1:
        ids_step = length
    _rotate[(batch * tiles * head_groups,)](
        query, key, cos, sin, position_ids, *outs, query_heads, key_heads, length, half,
        query.stride()[:3], key.stride()[:3], _table_steps(cos), _table_steps(sin), ids_step, sign,
        head_groups, tiles, HAS_IDS=position_ids is not None, INTERLEAVED=interleaved,
        TOKENS=tokens, HALF=block, HEADS=HEADS, num_warps=WARPS,
    )  # fmt: skip
    return outs


@operator("query", "key")
def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _rotated(query, key, cos, sin, interleaved, position_ids, 1.0)


@operator("d_query", "d_key")
def rotary_embedding_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _rotated(grad_query, grad_key, cos, sin, interleaved, position_ids, -1.0)
