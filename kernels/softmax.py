"""softmax and log_softmax over the last dimension, forward and backward.

    out = exp(s − max s) / Σ exp(s − max s)        s = scale · x over the allowed entries
    dx  = scale · y · (g − Σ g·y)                  log: scale · (g − exp(y) · Σ g)

A program owns whole rows: several short ones, or one whose entries lie in registers, so that
memory is read once and written once (bound: memory bandwidth). A row longer than MAX_BLOCK is
walked in chunks, each lane with its own running maximum and sum (read twice, written once).
Rows may lie anywhere: their offsets come from sizes and strides, merged where they can be.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._register import operator

# Reasoned from published kernels (Triton's fused-softmax tutorial, Liger, QuACK's threads-per-row
# table), not measured here: 16 to 32 entries of a row per thread keep the row in registers, and
# a tile of about 4096 entries gives a program of short rows enough loads in flight.
TILE = 4096  # entries that the rows of one program have together, when rows are short
MAX_ROWS = 64  # rows of one program at most
MAX_BLOCK = 16384  # entries of a row that are held in registers
LOOP_BLOCK = 8192  # entries per step of a longer row
WARPS = ((2048, 4), (8192, 8), (16384, 16))  # (tile entries at most, warps)


def tiling(columns: int) -> tuple[int, int, int, bool]:
    """(rows of a program, block of columns, warps, whether the row is walked in steps)."""
    if columns > MAX_BLOCK:
        return 1, LOOP_BLOCK, 16, True
    block = max(triton.next_power_of_2(columns), 16)
    rows = max(1, min(MAX_ROWS, TILE // block))
    warps = next(w for most, w in WARPS if rows * block <= most)
    return rows, block, warps, False


@triton.jit
def _row_offsets(row, sizes, strides):
    """Offset of each row, and its index in the last of `sizes`, from mixed-radix digits."""
    offset = row * 0
    last = row * 0
    rest = row
    for d in tl.static_range(len(sizes)):  # innermost first
        digit = rest % sizes[d]
        rest = rest // sizes[d]
        offset += digit * strides[d]
        if d == 0:
            last = digit
    return offset, last


@triton.jit
def _forward(
    x_ptr,
    mask_ptr,
    out_ptr,
    rows,
    columns,
    sizes,
    x_strides,
    mask_strides,
    mask_column_stride,
    scale,
    HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    offset, position = _row_offsets(row, sizes, x_strides)
    allowed = inside
    if IS_CAUSAL:
        allowed = allowed & (column <= position[:, None])  # what the rule leaves out is not read
    x = tl.load(x_ptr + offset[:, None] + column, mask=allowed, other=0.0).to(tl.float32)
    if HAS_MASK:
        offset, _ = _row_offsets(row, sizes, mask_strides)
        at = offset[:, None] + column.to(tl.int64) * mask_column_stride
        allowed = allowed & tl.load(mask_ptr + at, mask=inside, other=0).to(tl.int1)
    s = tl.where(allowed, x * scale, float("-inf"))
    s -= tl.max(s, axis=1)[:, None]
    e = tl.exp(s)
    total = tl.sum(e, axis=1)[:, None]
    if LOG:
        out = s - tl.log(total)
    else:
        out = e / total
    if HAS_MASK or IS_CAUSAL:
        # A row without an allowed entry is told by the mask: a row of −inf alone stays NaN.
        some = tl.max(allowed.to(tl.int32), axis=1)[:, None] > 0
        if LOG:
            out = tl.where(allowed, out, float("-inf"))
        else:
            out = tl.where(some, out, 0.0)
    tl.store(
        out_ptr + row[:, None] * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _scores(
    x_ptr, mask_ptr, column, columns, limit, mask_column_stride, scale, HAS_MASK: tl.constexpr
):
    """Scaled scores of one chunk of a row, −inf where not allowed, and what is allowed."""
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    allowed = column < limit
    if HAS_MASK:
        at = column.to(tl.int64) * mask_column_stride
        allowed = allowed & tl.load(mask_ptr + at, mask=column < columns, other=0).to(tl.int1)
    return tl.where(allowed, x * scale, float("-inf")), allowed


@triton.jit
def _forward_looped(
    x_ptr,
    mask_ptr,
    out_ptr,
    rows,
    columns,
    sizes,
    x_strides,
    mask_strides,
    mask_column_stride,
    scale,
    HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offset, position = _row_offsets(row, sizes, x_strides)
    x_ptr += offset
    out_ptr += row * columns
    if HAS_MASK:
        offset, _ = _row_offsets(row, sizes, mask_strides)
        mask_ptr += offset
    limit = columns
    if IS_CAUSAL:
        limit = tl.minimum(position + 1, columns).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, limit, BLOCK):  # entries past the limit are not read here
        s, allowed = _scores(
            x_ptr, mask_ptr, start + lane, columns, limit, mask_column_stride, scale, HAS_MASK
        )
        new_top = tl.maximum(top, s)
        # A lane that has met nothing yet has −inf − −inf here, which must not become NaN; one
        # that has met a real −inf (or NaN) shows in `seen`, and its row is made NaN at the end.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(s - base)
        top = new_top
        seen = seen | allowed.to(tl.int32)
    best = tl.max(top, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(total * tl.exp(top - base), axis=0)
    some = tl.max(seen, axis=0) > 0
    for start in range(0, columns, BLOCK):
        column = start + lane
        s, allowed = _scores(
            x_ptr, mask_ptr, column, columns, limit, mask_column_stride, scale, HAS_MASK
        )
        if LOG:
            out = tl.where(allowed, s - best - tl.log(total), float("-inf"))
        else:
            out = tl.where(some, tl.exp(s - best) / total, 0.0)
        tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _derivative(g, y, total, scale, LOG: tl.constexpr):
    if LOG:
        return tl.where(y == float("-inf"), 0.0, scale * (g - tl.exp(y) * total))
    else:
        return scale * y * (g - total)


@triton.jit
def _share(g, y, LOG: tl.constexpr):
    """What an entry adds to the row's sum; an entry that was left out adds nothing."""
    if LOG:
        return tl.where(y == float("-inf"), 0.0, g)
    else:
        return g * y


@triton.jit
def _backward(
    grad_ptr,
    out_ptr,
    d_ptr,
    rows,
    columns,
    scale,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    at = row[:, None] * columns + column
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(_share(g, y, LOG), axis=1)[:, None]
    d = _derivative(g, y, total, scale, LOG)
    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_looped(
    grad_ptr,
    out_ptr,
    d_ptr,
    rows,
    columns,
    scale,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * columns
    grad_ptr += at
    out_ptr += at
    d_ptr += at
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        g = tl.load(grad_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        y = tl.load(out_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        sums += _share(g, y, LOG)
    total = tl.sum(sums, axis=0)
    for start in range(0, columns, BLOCK):
        column = start + lane
        g = tl.load(grad_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        y = tl.load(out_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        d = _derivative(g, y, total, scale, LOG)
        tl.store(d_ptr + column, d.to(d_ptr.dtype.element_ty), mask=column < columns)


def merged(input: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[tuple[int, ...], ...]:
    """Leading sizes, input strides and mask strides, innermost first, with dimensions merged.

    The causal rule needs the index in dimension −2 by itself, so that one is kept apart then.
    """
    sizes: list[int] = []
    x_strides: list[int] = []
    mask_strides: list[int] = []
    for d in reversed(range(input.dim() - 1)):
        size, step, mask_step = (
            input.shape[d],
            input.stride(d),
            mask.stride(d) if mask is not None else 0,
        )
        if size == 1 and not (is_causal and not sizes):
            continue
        if (
            sizes
            and not (is_causal and len(sizes) == 1)
            and step == x_strides[-1] * sizes[-1]
            and mask_step == mask_strides[-1] * sizes[-1]
        ):
            sizes[-1] *= size
        else:
            sizes.append(size)
            x_strides.append(step)
            mask_strides.append(mask_step)
    if not sizes:
        return (1,), (0,), (0,)
    return tuple(sizes), tuple(x_strides), tuple(mask_strides)


@operator()
def softmax(input: Tensor, scale: float, mask: Tensor | None, is_causal: bool, log: bool) -> Tensor:
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    write_softmax(input, out, scale, mask, is_causal, log)
    return out


def write_softmax(
    input: Tensor, out: Tensor, scale: float, mask: Tensor | None, is_causal: bool, log: bool
) -> None:
    """The softmax into ``out``: contiguous, of any float dtype."""
    if out.numel() == 0:
        return
    columns = input.shape[-1]
    rows = out.numel() // columns
    per_program, block, warps, looped = tiling(columns)
    sizes, x_strides, mask_strides = merged(input, mask, is_causal)
    kernel = _forward_looped if looped else _forward
    kernel[(triton.cdiv(rows, per_program),)](
        input,
        mask,
        out,
        rows,
        columns,
        sizes,
        x_strides,
        mask_strides,
        0 if mask is None else mask.stride(-1),
        scale,
        HAS_MASK=mask is not None,
        IS_CAUSAL=is_causal,
        LOG=log,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
    )


@operator()
def softmax_backward(grad: Tensor, output: Tensor, scale: float, log: bool) -> Tensor:
    d_input = torch.empty_like(output)
    if d_input.numel() == 0:
        return d_input
    columns = output.shape[-1]
    rows = output.numel() // columns
    per_program, block, warps, looped = tiling(columns)
    kernel = _backward_looped if looped else _backward
    kernel[(triton.cdiv(rows, per_program),)](
        grad,
        output,
        d_input,
        rows,
        columns,
        scale,
        LOG=log,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
    )
    return d_input
