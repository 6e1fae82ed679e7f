"""Token embedding with positions, and the gradient of an embedding table.

    out[n] = scale · weight[input[n]] + position_weight[position[n]] + sinusoid(position[n])
    d_table[r] = scale · Σ grad[n] over the tokens n that looked row r up, in the order of n

Forward: a program owns a tile of tokens and columns. The sinusoid's angle is an integer of which
2⁶⁴ make a turn, so that position · frequency is one multiplication that drops whole turns: exact
where float32 would be off by 0.06 at a position of a million. Backward: the ids come sorted, with
the tokens they are from. A program sums a tile of SORTED ids and writes the rows of ids that lie
inside it; sums of an id that reaches over the tile's ends are kept apart and joined by a second
kernel, tile by tile: no atomics, and an id that fills half of the batch is still spread over many
programs. Bound: memory bandwidth. Source: Vaswani et al., 2017 (arXiv:1706.03762), 3.4 and 3.5.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._register import operator

# Not measured. 16-byte loads of 16-bit rows need 8 columns a thread; 4 warps make 1024.
TILE, WARPS = 1024, 4  # numbers of a program, forward
COLUMNS = 512  # of a program, backward
SORTED = 32  # ids of a program, backward


@triton.jit
def _sine(turns):
    """Sines of angles of which 2³² (uint32) are a turn, by the quadrant and polynomials of what
    is left, an eighth turn at most (our own fits, off by 3e-9)."""
    shifted = turns + 0x20000000
    x = ((shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 9.313225746154785e-10
    square = x * x
    s = 0.079680033 - 0.00460165786 * square
    s = (1.57079637 + square * (s * square - 0.64596349)) * x
    c = 0.253669232 + square * (0.000904021668 * square - 0.0208602883)
    c = 1.0 + square * (c * square - 1.23370051)
    y = tl.where((shifted & 0x40000000) != 0, c, s)
    return tl.where((shifted & 0x80000000) != 0, -y, y)


@triton.jit
def _forward(
    input_ptr, positions_ptr, weight_ptr, learned_ptr, turns_ptr, out_ptr,
    tokens, features, period, weight_stride, learned_stride, scale, column_tiles,
    HAS_POSITIONS: tl.constexpr, LEARNED: tl.constexpr, SINUSOIDAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % column_tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = token < tokens
    inside = real[:, None] & (column < features)
    row = tl.load(input_ptr + token, mask=real, other=0).to(tl.int64)[:, None]
    x = tl.load(weight_ptr + row * weight_stride + column, mask=inside, other=0.0)
    x = x.to(tl.float32) * scale
    if LEARNED or SINUSOIDAL:
        position = token % period
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + position, mask=real, other=0).to(tl.int64)
        if LEARNED:
            at = position[:, None] * learned_stride + column
            x += tl.load(learned_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SINUSOIDAL:
            turns = tl.load(turns_ptr + column, mask=column < features, other=0)
            angle = position[:, None] * turns
            quarter = (column & 1) << 30  # a cosine is the sine of a quarter turn more
            x += _sine((angle >> 32).to(tl.uint32) + quarter.to(tl.uint32))
    at = token[:, None] * features + column
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(
    table_ptr, partial_ptr, sums, row, tile, column, features, padding_idx, earlier, goes_on, scale
):
    """Of a tile's ids, one that began before it has row 0 of the tile's two partial sums, one that
    begins here and goes on behind it has row 1."""
    reaches_over = earlier | goes_on
    wanted = tl.where(row == padding_idx, 0, features)
    whole = tl.where(reaches_over == 0, wanted, 0)
    tl.store(
        table_ptr + row * features + column,
        (sums * scale).to(table_ptr.dtype.element_ty),
        mask=column < whole,
    )
    at = (tile * 2 + tl.where(earlier != 0, 0, 1)) * features + column
    tl.store(partial_ptr + at, sums, mask=column < wanted - whole)


@triton.jit
def _sum_tiles(
    grad_ptr, ids_ptr, order_ptr, table_ptr, partial_ptr,
    tokens, features, grad_stride, padding_idx, scale, column_tiles,
    SORTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles) * BLOCK + tl.arange(0, BLOCK)
    begin = tile * SORTED
    end = tl.minimum(begin + SORTED, tokens)
    current = tl.load(ids_ptr + begin).to(tl.int64)
    before = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    earlier = (before == current).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end):
        row = tl.load(ids_ptr + at).to(tl.int64)
        if row != current:
            _store_sums(
                table_ptr, partial_ptr, sums, current, tile, column, features, padding_idx,
                earlier, 0, scale,
            )  # fmt: skip
            sums = tl.zeros([BLOCK], tl.float32)
            current = row
            earlier = (row < 0).to(tl.int32)
        token = tl.load(order_ptr + at).to(tl.int64)
        g = tl.load(grad_ptr + token * grad_stride + column, mask=column < features, other=0.0)
        sums += g.to(tl.float32)
    after = tl.load(ids_ptr + end, mask=end < tokens, other=-1).to(tl.int64)
    _store_sums(
        table_ptr, partial_ptr, sums, current, tile, column, features, padding_idx, earlier,
        (after == current).to(tl.int32), scale,
    )  # fmt: skip


@triton.jit
def _join_tiles(
    ids_ptr, table_ptr, partial_ptr, tokens, features, padding_idx, scale, column_tiles,
    SORTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row of the id that begins in this tile and goes on behind it, if there is one."""
    program = tl.program_id(0)
    tile = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles) * BLOCK + tl.arange(0, BLOCK)
    begin = tile * SORTED
    end = begin + SORTED
    row = tl.load(ids_ptr + end, mask=end < tokens, other=-1).to(tl.int64)
    last = tl.load(ids_ptr + end - 1, mask=end < tokens, other=-2).to(tl.int64)
    before = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    if (row == last) & (row != before) & (row != padding_idx):
        inside = column < features
        sums = tl.load(partial_ptr + (tile * 2 + 1) * features + column, mask=inside, other=0.0)
        next_tile = tile + 1
        next_row = row
        while next_row == row:
            at = next_tile * 2 * features + column
            sums += tl.load(partial_ptr + at, mask=inside, other=0.0)
            next_tile += 1
            first = next_tile * SORTED
            next_row = tl.load(ids_ptr + first, mask=first < tokens, other=-1).to(tl.int64)
        at = row * features + column
        tl.store(table_ptr + at, (sums * scale).to(table_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def turns_per_position(features: int, device: torch.device) -> Tensor:
    """Each column's frequency, 10000^(−2⌊c/2⌋/features), in turns of 2⁶⁴ per position."""
    column = torch.arange(features)
    exponent = (column - column % 2).double() / features
    return (10000.0**-exponent * (2.0**64 / (2 * math.pi))).to(torch.int64).to(device)


@operator()
def embedding(
    input: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    sinusoidal: bool, scale: float,
) -> Tensor:  # fmt: skip
    features, tokens = weight.shape[1], input.numel()
    out = weight.new_empty((*input.shape, features))
    if out.numel() == 0:
        return out
    if positions is not None:
        period = positions.numel()
    else:
        period = input.shape[-1] if input.dim() else 1
    block = min(TILE, max(16, triton.next_power_of_2(features)))
    rows, column_tiles = TILE // block, triton.cdiv(features, block)
    _forward[(triton.cdiv(tokens, rows) * column_tiles,)](
        input, positions, weight, position_weight,
        turns_per_position(features, weight.device) if sinusoidal else None, out,
        tokens, features, period, weight.stride(0),
        0 if position_weight is None else position_weight.stride(0), scale, column_tiles,
        HAS_POSITIONS=positions is not None, LEARNED=position_weight is not None,
        SINUSOIDAL=sinusoidal, ROWS=rows, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return out


@operator()
def embedding_backward(
    grad: Tensor, ids: Tensor, order: Tensor, rows: int, scale: float, padding_idx: int
) -> Tensor:
    tokens, features = grad.shape
    d_table = grad.new_zeros((rows, features))
    if d_table.numel() == 0 or tokens == 0:
        return d_table
    tiles = triton.cdiv(tokens, SORTED)
    partial = grad.new_empty((tiles, 2, features), dtype=torch.float32)
    block = min(COLUMNS, max(16, triton.next_power_of_2(features)))
    column_tiles = triton.cdiv(features, block)
    launch = {"SORTED": SORTED, "BLOCK": block, "num_warps": max(1, block // 128)}
    _sum_tiles[(tiles * column_tiles,)](
        grad, ids, order, d_table, partial, tokens, features, grad.stride(0), padding_idx, scale,
        column_tiles, **launch,
    )  # fmt: skip
    _join_tiles[(tiles * column_tiles,)](
        ids, d_table, partial, tokens, features, padding_idx, scale, column_tiles, **launch
    )
    return d_table
