"""Cross entropy of logits against classes, per row, forward and backward.

    loss = −(1 − s) · w[y] · log p[y] − s/C · Σ_c w[c] · log p[c]        log p = x − top − log_sum
    dx   = g · ((1 − s) · w[y] · (p − onehot(y)) + s/C · (p · Σ w − w))

Forward: a program owns several short rows, or walks one in steps with a running maximum that the
whole row shares, so that an entry costs one exponential; sums stay apart in the lanes until the
end. Since nothing is written per entry, no row is too long for one read. Backward: a program turns
a tile of logits into gradients from 16 bytes a row, without a reduction. Rows that are left out are
not read. Bound: memory bandwidth. Sources: Milakov and Gimelshein, Online normalizer calculation
for softmax, 2018 (arXiv:1805.02867); label smoothing: Szegedy et al., 2015 (arXiv:1512.00567).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._register import operator

# Not measured: reasoned as softmax's. Steps of 8192 entries keep 16 loads of 16 bytes in flight a
# warp; the lanes' sums and a step's entries are then 32 registers a thread.
TILE = 4096  # entries that the rows of one program have together, when rows are short
MAX_ROWS = 64  # rows of one program at most
STEP = 8192  # entries of a row at a time, forward
BACKWARD_TILE = 2048  # entries of a program, backward
WARPS = ((2048, 4), (4096, 8), (8192, 16))  # (tile entries at most, warps)


@triton.jit
def _forward(
    x_ptr, target_ptr, weight_ptr, losses_ptr, statistics_ptr,
    rows, columns, x_stride, ignore_index, smoothing, share,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_ptr + row, mask=row < rows, other=0).to(tl.int64)
    kept = (row < rows) & (target != ignore_index)
    x_ptr += row * x_stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    base = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    weights = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = kept[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr[:, None] + column[None, :], mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        new_base = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − −inf would be NaN
        total = total * tl.exp(top - new_base)[:, None] + tl.exp(x - new_base[:, None])
        if SMOOTH:
            w = tl.full([BLOCK], 1.0, tl.float32)
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
            weighted += weights * (base - new_base)[:, None]
            weighted += tl.where(inside, w[None, :] * (x - new_base[:, None]), 0.0)
            weights += tl.where(inside, w[None, :], 0.0)
        top = new_top
        base = new_base
    log_sum = tl.log(tl.sum(total, axis=1))
    target_weight = tl.full([ROWS], 1.0, tl.float32)
    if HAS_WEIGHT:
        target_weight = tl.load(weight_ptr + target, mask=kept, other=0.0).to(tl.float32)
    logit = tl.load(x_ptr + target, mask=kept, other=0.0).to(tl.float32)
    # Less the maximum first: what is left is exact where it is small.
    loss = (smoothing - 1.0) * target_weight * ((logit - top) - log_sum)
    weight_sum = tl.full([ROWS], 0.0, tl.float32) + columns
    if SMOOTH:
        weight_sum = tl.sum(weights, axis=1)
        loss -= share * (tl.sum(weighted, axis=1) - log_sum * weight_sum)
    statistics_ptr += row * 4
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0), mask=row < rows)
    tl.store(statistics_ptr, tl.where(kept, top, 0.0), mask=row < rows)
    tl.store(statistics_ptr + 1, tl.where(kept, log_sum, 0.0), mask=row < rows)
    tl.store(statistics_ptr + 2, tl.where(kept, target_weight, 0.0), mask=row < rows)
    tl.store(statistics_ptr + 3, tl.where(kept, weight_sum, 0.0), mask=row < rows)


@triton.jit
def _backward(
    grad_ptr, x_ptr, target_ptr, weight_ptr, statistics_ptr, d_ptr,
    rows, columns, grad_stride, x_stride, ignore_index, smoothing, share, column_tiles,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % column_tiles) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    target = tl.load(target_ptr + row, mask=real, other=0).to(tl.int64)
    kept = real & (target != ignore_index)
    inside = real[:, None] & (column < columns)[None, :]
    x = tl.load(
        x_ptr + row[:, None] * x_stride + column[None, :], mask=inside & kept[:, None], other=0.0
    ).to(tl.float32)
    statistics_ptr += row * 4
    top = tl.load(statistics_ptr, mask=real, other=0.0)[:, None]
    log_sum = tl.load(statistics_ptr + 1, mask=real, other=0.0)[:, None]
    target_weight = tl.load(statistics_ptr + 2, mask=real, other=0.0)
    g = tl.load(grad_ptr + row * grad_stride, mask=real, other=0.0)
    p = tl.exp((x - top) - log_sum)
    hit = (g * (1.0 - smoothing) * target_weight)[:, None]
    d = hit * (p - tl.where(column[None, :] == target[:, None], 1.0, 0.0))
    if SMOOTH:
        weight_sum = tl.load(statistics_ptr + 3, mask=real, other=0.0)[:, None]
        w = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        d += (g * share)[:, None] * (p * weight_sum - w[None, :])
    d = tl.where(kept[:, None], d, 0.0)
    at = row[:, None] * columns + column[None, :]
    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=inside)


def _tiling(columns: int, tile: int, most: int) -> tuple[int, int, int]:
    """(rows of a program, entries of a row at a time, warps)."""
    block = min(most, max(16, triton.next_power_of_2(columns)))
    rows = max(1, min(MAX_ROWS, tile // block))
    return rows, block, next(w for entries, w in WARPS if rows * block <= entries)


@operator("losses", "statistics")
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    rows, columns = input.shape
    losses = input.new_empty((rows,), dtype=torch.float32)
    statistics = input.new_empty((rows, 4), dtype=torch.float32)
    if rows == 0:
        return losses, statistics
    per_program, block, warps = _tiling(columns, TILE, STEP)
    _forward[(triton.cdiv(rows, per_program),)](
        input, target, weight, losses, statistics, rows, columns, input.stride(0), ignore_index,
        label_smoothing, label_smoothing / max(1, columns), HAS_WEIGHT=weight is not None,
        SMOOTH=label_smoothing != 0.0, ROWS=per_program, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return losses, statistics


@operator()
def cross_entropy_backward(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    ignore_index: int, label_smoothing: float,
) -> Tensor:  # fmt: skip
    rows, columns = input.shape
    d_input = input.new_empty(input.shape)
    if d_input.numel() == 0:
        return d_input
    per_program, block, warps = _tiling(columns, BACKWARD_TILE, BACKWARD_TILE)
    column_tiles = triton.cdiv(columns, block)
    _backward[(triton.cdiv(rows, per_program) * column_tiles,)](
        grad, input, target, weight, statistics, d_input, rows, columns, grad.stride(0),
        input.stride(0), ignore_index, label_smoothing, label_smoothing / columns, column_tiles,
        HAS_WEIGHT=weight is not None, SMOOTH=label_smoothing != 0.0, ROWS=per_program,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return d_input
