"""Attention, forward (FlashAttention-2): device functions that both directions share, and _forward.

    s = scale · <q_i, k_j>;  softcap;  + ALiBi;  + bias;  −inf where masked
    out_i = Σ_j exp(s_ij − lse_i) v_j         lse_i = log Σ_j exp(s_ij)

A program owns one tile of BLOCK_M queries of one head, and walks the keys in tiles of BLOCK_N with
a running maximum and sum: no S × T matrix is stored. Scores of 16-bit inputs are kept in base 2
(UNIT = log2 e is folded into the scale), so that exp is one instruction. float32 keeps UNIT = 1,
where differences of scores lose less to rounding, and so does a call with a bias: that would have
to be multiplied as well, which saves nothing, and finfo.min · log2 e is beyond float32.

Tiles of keys fall into three runs: those cut by the left edge of the window, those that every query
of the tile sees whole (no positional test), and those cut by the right edge, the causal diagonal or
the end; tiles that no query sees are never touched. The causal rule is a window with nothing to its
right. Bound: matrix units.
Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), sections 3.1 and 3.2.
"""

import triton
import triton.language as tl

from ._device import dot, keep_mask, tanh


@triton.jit
def load_tile(
    ptr, at, row, rows, column, ROW_MASK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements at ptr + at, 0 outside; row and column are broadcast against each other."""
    if ROW_MASK:
        if COLUMNS < BLOCK:
            return tl.load(ptr + at, mask=(row < rows) & (column < COLUMNS), other=0.0)
        else:
            return tl.load(ptr + at, mask=row < rows, other=0.0)
    elif COLUMNS < BLOCK:
        return tl.load(ptr + at, mask=column < COLUMNS, other=0.0)
    else:
        return tl.load(ptr + at)


@triton.jit
def sequence_of(cu_q_ptr, cu_k_ptr, b, S, T, shift, VARLEN: tl.constexpr):
    """(queries, keys, shift, first row of the query, of the key) of batch entry b. Of packed
    sequences S and T are the longest lengths, and shift is 1 if the last query stands at the last
    key, else 0."""
    start_q = b * 0
    start_k = b * 0
    if VARLEN:
        start_q = tl.load(cu_q_ptr + b).to(tl.int64)
        start_k = tl.load(cu_k_ptr + b).to(tl.int64)
        S = (tl.load(cu_q_ptr + b + 1) - start_q).to(tl.int32)
        T = (tl.load(cu_k_ptr + b + 1) - start_k).to(tl.int32)
        shift = shift * (T - S)
    return S, T, shift, start_q, start_k


@triton.jit
def key_runs(
    first, last, limit, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(lo, full_lo, full_hi, hi) for queries first..last: [lo, hi) is seen by some of them and
    [full_lo, full_hi) by all; lo and the inner two are multiples of BLOCK_N."""
    lo = first * 0
    hi = limit
    full_lo = lo
    full_hi = limit
    if RIGHT:
        hi = tl.minimum(hi, last + shift + right + 1)
        full_hi = tl.minimum(full_hi, first + shift + right + 1)
    if LEFT:
        lo = tl.maximum(first + shift - left, 0) // BLOCK_N * BLOCK_N
        full_lo = (tl.maximum(last + shift - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_hi = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N
    some = full_lo < full_hi
    return lo, tl.where(some, full_lo, lo), tl.where(some, full_hi, lo), hi


@triton.jit
def power(x, UNIT: tl.constexpr):
    """exp(x / UNIT): UNIT is log2 e for base-2 scores, else 1."""
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@triton.jit
def scores(
    qk, i, j, mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope,
    softcap, scale,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores times UNIT, −inf where not allowed; what is allowed; and the softcap's derivative.

    With a bias UNIT is 1. i and j are the tile's queries and keys, shaped to broadcast either way
    round. With a softcap, `scale` is scale / softcap and `softcap` is softcap · UNIT; else `scale`
    is scale · UNIT.
    """
    factor = 1.0
    if SOFTCAP:
        t = tanh(qk * scale)
        factor = 1.0 - t * t
        s = t * softcap
    else:
        s = qk * scale
    if ALIBI:
        s -= slope * tl.abs((j - i - shift).to(tl.float32))
    allowed = (j < limit) & (i < S)
    if MASKED:
        if LEFT:
            allowed = allowed & (j >= i + shift - left)
        if RIGHT:
            allowed = allowed & (j <= i + shift + right)
    if HAS_MASK or HAS_BIAS:
        inside = (i < S) & (j < limit)
    if HAS_MASK:
        at = i.to(tl.int64) * mask_steps[0] + j.to(tl.int64) * mask_steps[1]
        allowed = allowed & tl.load(mask_ptr + at, mask=inside, other=0).to(tl.int1)
    if HAS_BIAS:
        at = i.to(tl.int64) * bias_steps[0] + j.to(tl.int64) * bias_steps[1]
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        allowed = allowed & (bias != float("-inf"))
        s += bias
    if MASKED or HAS_MASK or HAS_BIAS:
        s = tl.where(allowed, s, float("-inf"))
    return s, allowed, factor


@triton.jit
def _walk(
    acc, top, total, seen, q, i, k_ptr, v_ptr, k_step, v_step, mask_ptr, bias_ptr, mask_steps,
    bias_steps, S, T, limit, shift, left, right, slope, softcap, scale, seed, position, threshold,
    lo, hi,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes keys lo..hi into the running softmax of a tile of queries. Key 0 of query i has the
    number (position + i) · T for dropout."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    local = n.to(tl.int64) if WIDE else n
    k_at = local[None, :] * k_step + d[:, None]
    v_at = local[:, None] * v_step + e[None, :]
    for start in range(lo, hi, BLOCK_N):
        j = start + n
        origin = tl.cast(start, tl.int64)
        k = load_tile(
            k_ptr + origin * k_step, k_at, j[None, :], limit, d[:, None], MASKED, D, BLOCK_D
        )
        qk = dot(q, k)
        s, allowed, _ = scores(
            qk, i[:, None], j[None, :], mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit,
            shift, left, right, slope, softcap, scale, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP,
            ALIBI, UNIT, MASKED,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − −inf would be NaN
        p = power(s - base[:, None], UNIT)
        alpha = power(top - base, UNIT)
        total = total * alpha + tl.sum(p, axis=1)
        top = new_top
        if HAS_MASK or HAS_BIAS:
            seen = seen | tl.max(allowed.to(tl.int32), axis=1)
        if DROPOUT:
            at = (position + i[:, None]) * T + j[None, :]
            p = tl.where(keep_mask(seed, at, threshold), p, 0.0)
        acc = acc * alpha[:, None]
        v = load_tile(
            v_ptr + origin * v_step, v_at, j[:, None], limit, e[None, :], MASKED, E, BLOCK_E
        )
        acc = dot(p.to(v.dtype), v, acc)
    return acc, top, total, seen


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr, lengths_ptr,
    seed_ptr, cu_q_ptr, cu_k_ptr, q_strides, k_strides, v_strides, out_strides, mask_strides,
    bias_strides, slope_strides, H, group, S, T, R, shift, left, right, softcap, scale, threshold,
    keep_scale,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, LENGTHS: tl.constexpr, AT_END: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)  # b·H + h
    b = head // H
    h = head % H
    if RIGHT:
        tile = tiles - 1 - tile  # the tiles with most keys first, so that the last wave is short
    first = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    i = first + m
    local = m.to(tl.int64) if WIDE else m
    position = head * S
    S, limit, shift, start_q, start_k = sequence_of(
        cu_q_ptr, cu_k_ptr, b, S, T, shift, VARLEN
    )  # fmt: skip
    if VARLEN:
        limit = tl.where(first < S, limit, 0)  # a tile without queries sees nothing
        head = h
    if LENGTHS:
        limit = tl.minimum(T, tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0))
    if AT_END:  # the queries are the last of a cache's tokens
        shift = limit - S
    row0 = start_q + first.to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[1] + row0 * q_strides[2]
    k_ptr += b * k_strides[0] + (h // group) * k_strides[1] + start_k * k_strides[2]
    v_ptr += b * v_strides[0] + (h // group) * v_strides[1] + start_k * v_strides[2]
    mask_steps = (0, 0)
    bias_steps = (0, 0)
    if HAS_MASK:
        mask_ptr += b * mask_strides[0] + h * mask_strides[1]
        mask_steps = (mask_strides[2], mask_strides[3])
    if HAS_BIAS:
        bias_ptr += b * bias_strides[0] + h * bias_strides[1]
        bias_steps = (bias_strides[2], bias_strides[3])
    slope = 0.0
    if ALIBI:
        at = b * slope_strides[0] + h * slope_strides[1]
        slope = tl.load(slopes_ptr + at).to(tl.float32) * UNIT
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q = load_tile(
        q_ptr, local[:, None] * q_strides[2] + d[None, :], i[:, None], S, d[None, :], True, D,
        BLOCK_D,
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_M], tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last = tl.minimum(first + BLOCK_M, S) - 1
    lo, full_lo, full_hi, hi = key_runs(
        first, last, limit, shift, left, right, LEFT, RIGHT, BLOCK_N
    )
    if LEFT:
        acc, top, total, seen = _walk(
            acc, top, total, seen, q, i, k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr,
            bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope, softcap,
            scale, seed, position, threshold, lo, full_lo, D, E, HAS_MASK, HAS_BIAS, LEFT, RIGHT,
            SOFTCAP, ALIBI, DROPOUT, WIDE, BLOCK_N, BLOCK_D, BLOCK_E, UNIT, True,
        )  # fmt: skip
    acc, top, total, seen = _walk(
        acc, top, total, seen, q, i, k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, bias_ptr,
        mask_steps, bias_steps, S, T, limit, shift, left, right, slope, softcap, scale, seed,
        position, threshold, full_lo, full_hi, D, E, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP,
        ALIBI, DROPOUT, WIDE, BLOCK_N, BLOCK_D, BLOCK_E, UNIT, False,
    )  # fmt: skip
    acc, top, total, seen = _walk(
        acc, top, total, seen, q, i, k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, bias_ptr,
        mask_steps, bias_steps, S, T, limit, shift, left, right, slope, softcap, scale, seed,
        position, threshold, full_hi, hi, D, E, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI,
        DROPOUT, WIDE, BLOCK_N, BLOCK_D, BLOCK_E, UNIT, True,
    )  # fmt: skip
    # Whether a query has a key at all is told by the rules, never by the sum: a query that is NaN,
    # or whose scores are all −inf, comes out NaN.
    if HAS_MASK or HAS_BIAS:
        some = seen > 0
    else:
        end = limit + m * 0
        begin = m * 0
        if RIGHT:
            end = tl.minimum(end, i + shift + right + 1)
        if LEFT:
            begin = tl.maximum(begin, i + shift - left)
        some = begin < end
    base = tl.where(top == float("-inf"), 0.0, top)
    without_keys = float("-inf")
    if SINKS:
        without_keys = tl.load(sinks_ptr + h).to(tl.float32)
        sink = without_keys * UNIT
        new_base = tl.where(top == float("-inf"), sink, tl.maximum(top, sink))
        alpha = tl.where(top == float("-inf"), 1.0, power(base - new_base, UNIT))
        total = total * alpha + power(sink - new_base, UNIT)
        acc = acc * alpha[:, None]
        base = new_base
    if out_ptr.dtype.element_ty == tl.float32:
        out = acc * keep_scale / total[:, None]  # one rounding less than by the reciprocal
    else:
        out = acc * (keep_scale / total)[:, None]
    out = tl.where(some[:, None], out, 0.0)
    lse = tl.where(some, base * (1.0 / UNIT) + tl.log(total), without_keys)
    tl.store(lse_ptr + head * R + start_q + i, lse, mask=i < S)
    out_ptr += b * out_strides[0] + h * out_strides[1] + row0 * out_strides[2]
    tl.store(
        out_ptr + local[:, None] * out_strides[2] + e[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(i < S)[:, None] & (e < E)[None, :],
    )
