"""layer norm and RMS norm over rows, with residual and dropout before them: forward and backward.

    s = residual + dropout(x), rounded to the dtype      (or s = x)
    y = (s − mean) · rstd · w + b                        RMS norm: no mean, no b
    ds = rstd · (g·w − mean(g·w) − ŝ · mean(g·w·ŝ)) + grad_summed       ŝ = (s − mean) · rstd
    dw = Σ_rows g · ŝ,  db = Σ_rows g

Forward: a program owns several short rows or one long row held in registers, read once and
written once; a row longer than MAX_FORWARD is walked in chunks with Welford's recurrence in every
lane. Backward: a fixed number of programs stride over the rows and keep their share of dw and db
in registers; the shares are stored and summed by a second kernel in a fixed order, so the result
is the same from run to run. Rows longer than MAX_BACKWARD leave no room for the shares: one kernel
gives ds and another dw and db. Bound: memory bandwidth.
Sources: Ba et al. 2016; Zhang and Sennrich 2019; Welford 1962 with Chan's merge; the two-stage
weight gradient is that of Triton's layer-norm tutorial and Apex.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import keep_mask, keep_of
from ._reduce import sum_partials

# Reasoned from published kernels (Triton's layer-norm tutorial, Liger, Apex) and the registers
# that ptxas reports for sm_80 and sm_90 (tests/test_triton.py prints them); not measured here.
TILE = 4096  # entries that the rows of one program have together, when rows are short
BACKWARD_TILE = 2048
MAX_ROWS = 32  # rows of one program at most
MAX_FORWARD = 16384  # entries of a row that are held in registers, forward
MAX_BACKWARD = 8192  # … backward, with the shares of dw and db beside them
LOOP_BLOCK = 4096  # entries per step of a longer row
WARPS = ((1024, 4), (4096, 8), (16384, 16))  # (tile entries at most, warps)
# 528 = 4 × 132 and 264 = 2 × 132: whole waves on an H100's 132 multiprocessors. The number is the
# same on every device so that the sums are too.
PROGRAMS = ((1024, 528), (MAX_BACKWARD, 264))  # (columns' block at most, programs of the backward)
WEIGHT_ROWS, WEIGHT_COLUMNS, WEIGHT_SPLITS = 16, 128, 64  # tile and row splits of _weight_gradients


def tiling(columns: int, tile: int, longest: int) -> tuple[int, int, int, bool]:
    """(rows of a program, block of columns, warps, whether the row is walked in steps)."""
    if columns > longest:
        return 1, LOOP_BLOCK, 8, True
    block = max(triton.next_power_of_2(columns), 16)
    rows = max(1, min(MAX_ROWS, tile // block))
    warps = next(w for most, w in WARPS if rows * block <= most)
    return rows, block, warps, False


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, value, mask):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rstd(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _is_ordinary(variance):
    """Whether a variance + eps is that of squares that neither overflow nor lose their digits."""
    return (variance >= 1e-30) & (variance <= 3.4e38)  # NaN is not


@triton.jit
def _scale_for(variance):
    """1, or the power of 2 that a row is multiplied by before its statistics are taken again."""
    scale = tl.where(variance < 1e-30, 3.7778931862957162e22, 2.6469779601696886e-23)
    return tl.where(_is_ordinary(variance), 1.0, scale)


@triton.jit
def _scaled_rstd(variance, eps, scale):
    """rstd from the variance of a row times ``scale``, next to which eps may have vanished."""
    rstd = _rstd(variance, eps * scale * scale) * scale
    return tl.where(variance == 0.0, _rstd(variance, eps), rstd)


@triton.jit
def _moments(s, in_row, length, RMS: tl.constexpr):
    """(mean, variance) of whole rows, which are 0 outside ``in_row``."""
    if RMS:
        variance = tl.div_rn(tl.sum(s * s, axis=1), length)
        return variance * 0.0, variance
    else:
        about = tl.div_rn(tl.sum(s, axis=1), length)
        centred = tl.where(in_row, s - about[:, None], 0.0)
        off = tl.div_rn(tl.sum(centred, axis=1), length)  # what centring left
        variance = tl.div_rn(tl.sum(centred * centred, axis=1), length) - off * off
        return about + off, tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def row_statistics(s, in_row, length, eps, RMS: tl.constexpr):
    """(mean, rstd) of whole rows, which are 0 outside ``in_row``."""
    mean, variance = _moments(s, in_row, length, RMS)
    variance += eps
    rstd = _rstd(variance, 0.0)
    if tl.min(_is_ordinary(variance).to(tl.int32), axis=0) == 0:
        scale = _scale_for(variance)
        mean, variance = _moments(s * scale[:, None], in_row, length, RMS)
        mean = tl.div_rn(mean, scale)
        rstd = _scaled_rstd(variance, eps, scale)
    return mean, rstd


@triton.jit
def _summed(
    x_ptr, residual_ptr, x_at, residual_at, position, seed, threshold, keep_scale, inside,
    DTYPE: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The row that is normalized, rounded as it will be stored."""
    x = _load(x_ptr, x_at, inside)
    if DROPOUT:
        x = tl.where(keep_mask(seed, position, threshold), x * keep_scale, 0.0)
    if ADD:
        x = (x + _load(residual_ptr, residual_at, inside)).to(DTYPE).to(tl.float32)
    return x


@triton.jit
def _affine(
    y, weight_ptr, bias_ptr, column, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    if HAS_WEIGHT:
        y *= _load(weight_ptr, column, inside)
    if HAS_BIAS:
        y += _load(bias_ptr, column, inside)
    return y


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, mean_ptr, rstd_ptr, seed_ptr,
    rows, columns, length, x_stride, residual_stride, eps, threshold, keep_scale,
    RMS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    in_row = column < columns
    inside = (row < rows)[:, None] & in_row
    at = row[:, None] * columns + column
    seed = tl.load(seed_ptr) if DROPOUT else 0
    s = _summed(
        x_ptr, residual_ptr, row[:, None] * x_stride + column,
        row[:, None] * residual_stride + column, at, seed, threshold, keep_scale, inside,
        normed_ptr.dtype.element_ty, ADD, DROPOUT,
    )  # fmt: skip
    if ADD:
        _store(summed_ptr, at, s, inside)
    mean, rstd = row_statistics(s, in_row, length, eps, RMS)
    if not RMS:
        tl.store(mean_ptr + row, mean, mask=row < rows)
        s -= mean[:, None]
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = _affine(s * rstd[:, None], weight_ptr, bias_ptr, column, in_row, HAS_WEIGHT, HAS_BIAS)
    _store(normed_ptr, at, y, inside)


@triton.jit
def _add_moments(mean, square, count, s, inside, RMS: tl.constexpr):
    """Adds an entry of each lane to the mean of those that it has met and the squared distances
    from it (Welford); for RMS to the sum of the squares."""
    if RMS:
        square += s * s
    else:
        step = s - mean
        new_mean = mean + step / count
        square = tl.where(inside, square + step * (s - new_mean), square)
        mean = tl.where(inside, new_mean, mean)
    return mean, square


@triton.jit
def _join_moments(mean, square, lane, columns, length, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, variance) of a row from its lanes'."""
    if RMS:
        return 0.0, tl.div_rn(tl.sum(square, axis=0), length)
    else:
        steps = (columns - lane + BLOCK - 1) // BLOCK  # entries that each lane has met
        met = steps.to(tl.float32)
        row_mean = tl.div_rn(tl.sum(mean * met, axis=0), length)
        apart = tl.where(steps > 0, mean - row_mean, 0.0)
        row_mean += tl.div_rn(tl.sum(apart * met, axis=0), length)  # what centring left
        apart = tl.where(steps > 0, mean - row_mean, 0.0)
        return row_mean, tl.div_rn(tl.sum(square + met * apart * apart, axis=0), length)


@triton.jit
def _forward_looped(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, mean_ptr, rstd_ptr, seed_ptr,
    rows, columns, length, x_stride, residual_stride, eps, threshold, keep_scale,
    RMS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_of_row = row * columns
    x_ptr += row * x_stride
    if ADD:
        residual_ptr += row * residual_stride
        summed_ptr += start_of_row
    normed_ptr += start_of_row
    lane = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = tl.zeros([BLOCK], tl.float32)  # of the entries that a lane has met
    square = tl.zeros([BLOCK], tl.float32)  # their squared distances from it
    count = 0.0
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        s = _summed(
            x_ptr, residual_ptr, column, column, start_of_row + column, seed, threshold,
            keep_scale, inside, normed_ptr.dtype.element_ty, ADD, DROPOUT,
        )  # fmt: skip
        if ADD:
            _store(summed_ptr, column, s, inside)
        count += 1.0
        mean, square = _add_moments(mean, square, count, s, inside, RMS)
    row_mean, variance = _join_moments(mean, square, lane, columns, length, RMS, BLOCK)
    variance += eps
    rstd = _rstd(variance, 0.0)
    if ADD:
        tl.debug_barrier()  # `summed` is read back below, perhaps by another thread than wrote it
        x_ptr = summed_ptr
    if not _is_ordinary(variance):
        scale = _scale_for(variance)
        mean = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        count = 0.0
        for start in range(0, columns, BLOCK):
            inside = start + lane < columns
            count += 1.0
            s = _load(x_ptr, start + lane, inside) * scale
            mean, square = _add_moments(mean, square, count, s, inside, RMS)
        row_mean, variance = _join_moments(mean, square, lane, columns, length, RMS, BLOCK)
        row_mean /= scale
        rstd = _scaled_rstd(variance, eps, scale)
    if not RMS:
        tl.store(mean_ptr + row, row_mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        y = (_load(x_ptr, column, inside) - row_mean) * rstd
        y = _affine(y, weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
        _store(normed_ptr, column, y, inside)


@triton.jit
def _write_gradients(
    ds, grad_summed_ptr, grad_summed_at, d_summed_ptr, d_input_ptr, at, seed, threshold, keep_scale,
    inside, ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    if ADD:
        ds += _load(grad_summed_ptr, grad_summed_at, inside)
    _store(d_summed_ptr, at, ds, inside)
    if DROPOUT:
        d_input = tl.where(keep_mask(seed, at, threshold), ds * keep_scale, 0.0)
        _store(d_input_ptr, at, d_input, inside)


@triton.jit
def _backward(
    grad_ptr, grad_summed_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    d_summed_ptr, d_input_ptr, d_weight_ptr, d_bias_ptr,
    rows, columns, length, grad_stride, grad_summed_stride, s_stride, threshold, keep_scale,
    programs,
    RMS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    in_row = column < columns
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if HAS_WEIGHT:
        weight = _load(weight_ptr, column, in_row)
    if WEIGHT_GRAD:
        d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS_GRAD:
        d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        real = row < rows
        inside = real[:, None] & in_row
        g = _load(grad_ptr, row[:, None] * grad_stride + column, inside)
        s = _load(s_ptr, row[:, None] * s_stride + column, inside)
        rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
        if RMS:
            centred = s
        else:
            mean = tl.load(mean_ptr + row, mask=real, other=0.0)[:, None]
            centred = tl.where(in_row, s - mean, 0.0)
        unit = centred * rstd
        if WEIGHT_GRAD:
            d_weight += g * unit
        if BIAS_GRAD:
            d_bias += g
        if HAS_WEIGHT:
            g *= weight
        ds = g - unit * tl.div_rn(tl.sum(g * unit, axis=1), length)[:, None]
        if not RMS:
            ds -= tl.div_rn(tl.sum(g, axis=1), length)[:, None]
        _write_gradients(
            ds * rstd, grad_summed_ptr, row[:, None] * grad_summed_stride + column, d_summed_ptr,
            d_input_ptr, row[:, None] * columns + column, seed, threshold, keep_scale, inside, ADD,
            DROPOUT,
        )  # fmt: skip
    at = program.to(tl.int64) * columns + tl.arange(0, BLOCK)
    in_row = tl.arange(0, BLOCK) < columns
    if WEIGHT_GRAD:
        tl.store(d_weight_ptr + at, tl.sum(d_weight, axis=0), mask=in_row)
    if BIAS_GRAD:
        tl.store(d_bias_ptr + at, tl.sum(d_bias, axis=0), mask=in_row)


@triton.jit
def _backward_looped(
    grad_ptr, grad_summed_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    d_summed_ptr, d_input_ptr,
    columns, length, grad_stride, grad_summed_stride, s_stride, threshold, keep_scale,
    RMS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    s_ptr += row * s_stride
    seed = tl.load(seed_ptr) if DROPOUT else 0
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0 if RMS else tl.load(mean_ptr + row)
    lane = tl.arange(0, BLOCK)
    g_sum = tl.zeros([BLOCK], tl.float32)
    gs_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        g = _load(grad_ptr, column, inside)
        if HAS_WEIGHT:
            g *= _load(weight_ptr, column, inside)
        g_sum += g
        gs_sum += g * (_load(s_ptr, column, inside) - mean) * rstd
    g_mean = 0.0 if RMS else tl.div_rn(tl.sum(g_sum, axis=0), length)
    gs_mean = tl.div_rn(tl.sum(gs_sum, axis=0), length)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        g = _load(grad_ptr, column, inside)
        if HAS_WEIGHT:
            g *= _load(weight_ptr, column, inside)
        unit = (_load(s_ptr, column, inside) - mean) * rstd
        _write_gradients(
            (g - unit * gs_mean - g_mean) * rstd, grad_summed_ptr,
            row * grad_summed_stride + column, d_summed_ptr, d_input_ptr, row * columns + column,
            seed, threshold, keep_scale, inside, ADD, DROPOUT,
        )  # fmt: skip


@triton.jit
def _weight_gradients(
    grad_ptr, s_ptr, mean_ptr, rstd_ptr, d_weight_ptr, d_bias_ptr,
    rows, columns, grad_stride, s_stride, splits,
    RMS: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shares of dw and db for a strip of columns and every splits-th tile of rows."""
    split = tl.program_id(0) % splits
    column = (tl.program_id(0) // splits) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < columns
    d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * ROWS, rows, splits * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        real = row < rows
        inside = real[:, None] & in_row[None, :]
        g = _load(grad_ptr, row[:, None] * grad_stride + column[None, :], inside)
        if BIAS_GRAD:
            d_bias += g
        if WEIGHT_GRAD:
            s = _load(s_ptr, row[:, None] * s_stride + column[None, :], inside)
            if not RMS:
                s -= tl.load(mean_ptr + row, mask=real, other=0.0)[:, None]
            d_weight += g * s * tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
    at = split.to(tl.int64) * columns + column
    if WEIGHT_GRAD:
        tl.store(d_weight_ptr + at, tl.sum(d_weight, axis=0), mask=in_row)
    if BIAS_GRAD:
        tl.store(d_bias_ptr + at, tl.sum(d_bias, axis=0), mask=in_row)


def row_stride(x: Tensor | None) -> int:
    """Of two dimensions with any row stride, or of a contiguous tensor of any other rank."""
    if x is None:
        return 0
    return x.stride(0) if x.dim() == 2 else x.shape[-1]


def forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed, mean, rstd); summed only with a residual and mean only without rms count."""
    rows, columns = math.prod(input.shape[:-1]), input.shape[-1]
    normed = input.new_empty(input.shape)
    summed = normed if residual is None else torch.empty_like(normed)
    rstd = input.new_empty((rows,), dtype=torch.float32)
    mean = rstd if rms else torch.empty_like(rstd)
    if normed.numel() == 0:
        return normed, summed, mean, rstd
    per_program, block, warps, looped = tiling(columns, TILE, MAX_FORWARD)
    kernel = _forward_looped if looped else _forward
    kernel[(triton.cdiv(rows, per_program),)](
        input, residual, weight, bias, normed, summed, mean, rstd, seed,
        rows, columns, float(columns), row_stride(input), row_stride(residual),
        eps, *keep_of(dropout_p),
        RMS=rms, ADD=residual is not None, DROPOUT=seed is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, ROWS=per_program, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return normed, summed, mean, rstd


def backward(
    grad: Tensor, grad_summed: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor | None,
    rstd: Tensor, dropout_p: float, seed: Tensor | None, weight_grad: bool, bias_grad: bool,
    wide_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_summed, d_input, d_weight, d_bias); what is not wanted has shape (0,). d_bias has the
    weight's dtype, or is float32 if ``wide_bias``."""
    rows, columns = math.prod(s.shape[:-1]), s.shape[-1]
    d_summed = s.new_empty(s.shape)
    d_input = s.new_empty((0,) if seed is None else s.shape)
    dtype = torch.float32 if weight is None else weight.dtype
    d_weight = s.new_empty((columns if weight_grad else 0,), dtype=dtype)
    bias_dtype = torch.float32 if wide_bias else dtype
    d_bias = s.new_empty((columns if bias_grad else 0,), dtype=bias_dtype)
    if d_summed.numel() == 0:
        return d_summed, d_input, d_weight.zero_(), d_bias.zero_()
    per_program, block, warps, looped = tiling(columns, BACKWARD_TILE, MAX_BACKWARD)
    tiles = triton.cdiv(rows, per_program)
    strides = (row_stride(grad_summed), row_stride(s))
    keep = keep_of(dropout_p)
    flags = {
        "RMS": mean is None,
        "ADD": grad_summed is not None,
        "DROPOUT": seed is not None,
        "HAS_WEIGHT": weight is not None,
    }
    if looped:
        partials = min(WEIGHT_SPLITS, triton.cdiv(rows, WEIGHT_ROWS))
    else:
        partials = min(next(p for most, p in PROGRAMS if block <= most), tiles)
    weight_partial = s.new_empty((partials, d_weight.numel()), dtype=torch.float32)
    bias_partial = s.new_empty((partials, d_bias.numel()), dtype=torch.float32)
    if not looped:
        _backward[(partials,)](
            grad, grad_summed, s, weight, mean, rstd, seed, d_summed, d_input, weight_partial,
            bias_partial, rows, columns, float(columns), row_stride(grad), *strides, *keep,
            partials, **flags,
            WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, ROWS=per_program, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    else:
        _backward_looped[(rows,)](
            grad, grad_summed, s, weight, mean, rstd, seed, d_summed, d_input, columns,
            float(columns), row_stride(grad), *strides, *keep, **flags, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
        if weight_grad or bias_grad:
            _weight_gradients[(partials * triton.cdiv(columns, WEIGHT_COLUMNS),)](
                grad, s, mean, rstd, weight_partial, bias_partial, rows, columns, row_stride(grad),
                row_stride(s), partials, RMS=mean is None, WEIGHT_GRAD=weight_grad,
                BIAS_GRAD=bias_grad, ROWS=WEIGHT_ROWS, COLUMNS=WEIGHT_COLUMNS, num_warps=4,
            )  # fmt: skip
    for partial, out in ((weight_partial, d_weight), (bias_partial, d_bias)):
        if out.numel():
            sum_partials(partial, out)
    return d_summed, d_input, d_weight, d_bias
