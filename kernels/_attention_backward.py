"""Attention, backward (FlashAttention-2), from (query, key, value, out, lse) and recomputed scores.

    p_ij  = exp(s_ij − lse_i)                  dv_j = Σ_i p_ij do_i
    ds_ij = p_ij (<do_i, v_j> − delta_i)       delta_i = <do_i, out_i> − dlse_i
    dq_i  = scale Σ_j ds_ij k_j                dk_j = scale Σ_i ds_ij q_i          dbias = ds

Four kernels, in this order, none with atomics, so gradients are the same from run to run. delta: a
program owns a tile of queries. dq: a program owns a tile of queries and walks the keys; it may
better what the rest start from. dk, dv: a program owns a tile of keys of one key head and walks the
queries of every query head of its group, which sums over the group without copies of keys. dbias,
if wanted: a program owns a tile of the *unexpanded* bias and walks every (batch, head, tile) that
broadcasts onto it, so it takes no memory beyond the result. dk, dv and dq each recompute the
scores: 7 tile matmuls where one fused kernel with atomic or ordered adds has 5. Bound: matrix
units.
Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 3.1; split as in Triton's tutorial.
"""

import triton
import triton.language as tl

from ._attention import key_runs, load_tile, power, scores, sequence_of
from ._device import dot, keep_mask


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, rows_ptr, out_strides, grad_strides, H, S,
    E: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Of every query: lse in the unit of scores, or +inf, which makes p 0, without keys; delta."""
    tiles = tl.cdiv(S, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    row = i.to(tl.int64)[:, None]
    inside = (i < S)[:, None] & (e < E)[None, :]
    out_ptr += (head // H) * out_strides[0] + (head % H) * out_strides[1]
    grad_ptr += (head // H) * grad_strides[0] + (head % H) * grad_strides[1]
    out = tl.load(out_ptr + row * out_strides[2] + e[None, :], mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * grad_strides[2] + e[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + head * S + i, mask=i < S, other=0.0)
    lse = tl.load(lse_ptr + head * S + i, mask=i < S, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * UNIT
    tl.store(rows_ptr + head * 3 * S + i, lse, mask=i < S)
    tl.store(rows_ptr + (head * 3 + 2) * S + i, delta, mask=i < S)


@triton.jit
def _gradient_tile(
    qk, dp, i, j, lse, share, delta, mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit,
    shift, left, right, slope, softcap, scale, seed, position, threshold, keep_scale,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(p as it meets v, p, gradient of the score with its bias, the softcap's derivative).

    lse is +inf for queries without keys and beyond the end, which makes p 0 there.
    """
    s, allowed, factor = scores(
        qk, i, j, mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right,
        slope, softcap, scale, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI, UNIT, MASKED,
    )  # fmt: skip
    x = s - lse
    if UNIT == 1.0:
        # Above 0 only by rounding, which may be any number where scores are large.
        p = power(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), UNIT) * share
    else:
        p = power(x, UNIT)
    if MASKED or HAS_MASK or HAS_BIAS:
        p = tl.where(allowed, p, 0.0)  # of a NaN query too
    dropped = p
    if DROPOUT:
        keep = keep_mask(seed, (position + i) * T + j, threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED or HAS_MASK or HAS_BIAS:
        ds = tl.where(allowed, ds, 0.0)  # a key that is left out may hold NaN, and dp with it
    return dropped, p, ds, factor


@triton.jit
def _load_rows(rows_ptr, i, S, R, UNIT: tl.constexpr):
    """(lse, share, delta) of queries i (see dq_kernel), R apart; lse is +inf beyond the end."""
    lse = tl.load(rows_ptr + i, mask=i < S, other=float("inf"))
    share = lse
    if UNIT == 1.0:
        share = tl.load(rows_ptr + R + i, mask=i < S, other=1.0)
    delta = tl.load(rows_ptr + 2 * R + i, mask=i < S, other=0.0)
    return lse, share, delta


@triton.jit
def _walk_queries(
    dk, dv, k, v, j, q_ptr, grad_ptr, rows_ptr, q_step, grad_step, mask_ptr, bias_ptr, mask_steps,
    bias_steps, S, T, R, limit, shift, left, right, slope, softcap, scale, seed, position,
    threshold, keep_scale, lo, hi,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what queries lo..hi of one head give to a tile of keys; tiles are (keys, queries)."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    local = m.to(tl.int64) if WIDE else m
    q_at = local[:, None] * q_step + d[None, :]
    grad_at = local[:, None] * grad_step + e[None, :]
    for start in range(lo, hi, BLOCK_M):
        i = start + m
        origin = tl.cast(start, tl.int64)
        q = load_tile(q_ptr + origin * q_step, q_at, i[:, None], S, d[None, :], MASKED, D, BLOCK_D)
        grad = load_tile(
            grad_ptr + origin * grad_step, grad_at, i[:, None], S, e[None, :], MASKED, E, BLOCK_E
        )
        qk = dot(k, tl.trans(q))
        dp = dot(v, tl.trans(grad))
        lse, share, delta = _load_rows(rows_ptr, i, S, R, UNIT)
        dropped, _, ds, factor = _gradient_tile(
            qk, dp, i[None, :], j[:, None], lse[None, :], share[None, :], delta[None, :],
            mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope,
            softcap, scale, seed, position, threshold, keep_scale, HAS_MASK, HAS_BIAS, LEFT, RIGHT,
            SOFTCAP, ALIBI, DROPOUT, UNIT, MASKED,
        )  # fmt: skip
        dv = dot(dropped.to(grad.dtype), grad, dv)
        dk = dot((ds * factor).to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr, slopes_ptr,
    lengths_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, q_strides, k_strides, v_strides, grad_strides,
    dk_strides, dv_strides, mask_strides, bias_strides, slope_strides, H, group, S, T, R, shift,
    left, right, softcap, scale, d_scale, threshold, keep_scale,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_N)
    first = (tl.program_id(0) % tiles) * BLOCK_N
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)  # b·G + g
    b = kv_head // (H // group)
    g = kv_head % (H // group)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    j = first + n
    local = n.to(tl.int64) if WIDE else n
    origin = first.to(tl.int64)
    longest = S
    S, keys, shift, start_q, start_k = sequence_of(cu_q_ptr, cu_k_ptr, b, S, T, shift, VARLEN)
    limit = keys
    if LENGTHS:
        limit = tl.minimum(T, tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0))
    origin += start_k
    k_ptr += b * k_strides[0] + g * k_strides[1] + origin * k_strides[2]
    v_ptr += b * v_strides[0] + g * v_strides[1] + origin * v_strides[2]
    # Keys behind the limit load as 0; what they then gather stays in their own rows, unstored.
    k = load_tile(
        k_ptr, local[:, None] * k_strides[2] + d[None, :], j[:, None], limit, d[None, :], True, D,
        BLOCK_D,
    )  # fmt: skip
    v = load_tile(
        v_ptr, local[:, None] * v_strides[2] + e[None, :], j[:, None], limit, e[None, :], True, E,
        BLOCK_E,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    # Runs of queries, as key_runs has them of keys: seen by some in [lo, hi), by all in between.
    last = tl.minimum(first + BLOCK_N, limit) - 1
    lo = first * 0
    hi = tl.where(first < limit, S, 0)
    full_lo = lo
    full_hi = hi
    if RIGHT:
        lo = tl.maximum(first - shift - right, 0) // BLOCK_M * BLOCK_M
        full_lo = (tl.maximum(last - shift - right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if LEFT:
        hi = tl.minimum(hi, last - shift + left + 1)
        full_hi = tl.minimum(full_hi, first - shift + left + 1)
    full_hi = tl.maximum(full_hi, 0) // BLOCK_M * BLOCK_M
    some = full_lo < full_hi
    full_lo = tl.where(some, full_lo, lo)
    full_hi = tl.where(some, full_hi, lo)
    for r in range(0, group):
        h = g * group + r
        head = b * H + h
        position = head * longest
        if VARLEN:
            head = h
        head_mask_ptr = mask_ptr
        head_bias_ptr = bias_ptr
        mask_steps = (0, 0)
        bias_steps = (0, 0)
        if HAS_MASK:
            head_mask_ptr = mask_ptr + (b * mask_strides[0] + h * mask_strides[1])
            mask_steps = (mask_strides[2], mask_strides[3])
        if HAS_BIAS:
            head_bias_ptr = bias_ptr + (b * bias_strides[0] + h * bias_strides[1])
            bias_steps = (bias_strides[2], bias_strides[3])
        slope = 0.0
        if ALIBI:
            at = b * slope_strides[0] + h * slope_strides[1]
            slope = tl.load(slopes_ptr + at).to(tl.float32) * UNIT
        head_rows_ptr = rows_ptr + head * 3 * R + start_q
        head_q_ptr = q_ptr + (b * q_strides[0] + h * q_strides[1] + start_q * q_strides[2])
        head_grad_ptr = grad_ptr + b * grad_strides[0] + h * grad_strides[1]
        head_grad_ptr += start_q * grad_strides[2]
        if RIGHT:
            dk, dv = _walk_queries(
                dk, dv, k, v, j, head_q_ptr, head_grad_ptr, head_rows_ptr,
                q_strides[2], grad_strides[2], head_mask_ptr, head_bias_ptr,
                mask_steps, bias_steps, S, T, R, limit, shift, left, right, slope, softcap,
                scale, seed, position, threshold, keep_scale, lo, full_lo, D, E, HAS_MASK,
                HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, WIDE, BLOCK_M, BLOCK_D, BLOCK_E,
                UNIT, True,
            )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, j, head_q_ptr, head_grad_ptr, head_rows_ptr,
            q_strides[2], grad_strides[2], head_mask_ptr, head_bias_ptr, mask_steps, bias_steps, S,
            T, R, limit, shift, left, right, slope, softcap, scale, seed, position, threshold,
            keep_scale, full_lo, full_hi, D, E, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI,
            DROPOUT, WIDE, BLOCK_M, BLOCK_D, BLOCK_E, UNIT, False,
        )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, j, head_q_ptr, head_grad_ptr, head_rows_ptr,
            q_strides[2], grad_strides[2], head_mask_ptr, head_bias_ptr, mask_steps, bias_steps, S,
            T, R, limit, shift, left, right, slope, softcap, scale, seed, position, threshold,
            keep_scale, full_hi, hi, D, E, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI,
            DROPOUT, WIDE, BLOCK_M, BLOCK_D, BLOCK_E, UNIT, True,
        )  # fmt: skip
    dk_ptr += b * dk_strides[0] + g * dk_strides[1] + origin * dk_strides[2]
    dv_ptr += b * dv_strides[0] + g * dv_strides[1] + origin * dv_strides[2]
    dk = tl.where((j < limit)[:, None], dk * d_scale, 0.0)
    dv = tl.where((j < limit)[:, None], dv, 0.0)
    tl.store(
        dk_ptr + local[:, None] * dk_strides[2] + d[None, :],
        dk.to(dk_ptr.dtype.element_ty),
        mask=(j < keys)[:, None] & (d < D)[None, :],
    )
    tl.store(
        dv_ptr + local[:, None] * dv_strides[2] + e[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=(j < keys)[:, None] & (e < E)[None, :],
    )


@triton.jit
def _walk_keys(
    dq, mean, total, excess, q, grad, i, lse, delta, k_ptr, v_ptr, k_step, v_step, mask_ptr,
    bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope, softcap, scale, seed,
    position, threshold, keep_scale, lo, hi,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys lo..hi give to a tile of queries: Σ ds k, Σ p k, Σ p, Σ ds (see dq_kernel)."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    local = n.to(tl.int64) if WIDE else n
    k_at = local[:, None] * k_step + d[None, :]
    v_at = local[:, None] * v_step + e[None, :]
    for start in range(lo, hi, BLOCK_N):
        j = start + n
        origin = tl.cast(start, tl.int64)
        k = load_tile(
            k_ptr + origin * k_step, k_at, j[:, None], limit, d[None, :], MASKED, D, BLOCK_D
        )
        v = load_tile(
            v_ptr + origin * v_step, v_at, j[:, None], limit, e[None, :], MASKED, E, BLOCK_E
        )
        qk = dot(q, tl.trans(k))
        dp = dot(grad, tl.trans(v))
        _, p, ds, factor = _gradient_tile(
            qk, dp, i[:, None], j[None, :], lse[:, None], 1.0, delta[:, None], mask_ptr, bias_ptr,
            mask_steps, bias_steps, S, T, limit, shift, left, right, slope, softcap, scale, seed,
            position, threshold, keep_scale, HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI,
            DROPOUT, UNIT, MASKED,
        )  # fmt: skip
        if UNIT == 1.0:
            total += tl.sum(p, axis=1)
            excess += tl.sum(ds, axis=1)
            mean = dot((p * factor).to(k.dtype), k, mean)
        dq = dot((ds * factor).to(k.dtype), k, dq)
    return dq, mean, total, excess


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, rows_ptr, dq_ptr, mask_ptr, bias_ptr, slopes_ptr,
    sinks_ptr, lengths_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, q_strides, k_strides, v_strides,
    grad_strides, dq_strides, mask_strides, bias_strides, slope_strides, H, group, S, T, R, shift,
    left, right, softcap, scale, d_scale, threshold, keep_scale,
    HAS_GRAD_LSE: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq; with UNIT 1 also what the later kernels take p and delta from.

    p from lse alone sums to total = Σ_j exp(s_ij − lse_i), which is 1 but for rounding, and any
    number where |lse| is large (the number of keys, in a row of finfo.min). This kernel meets whole
    rows anyway, so it finds the sum: its own result is divided by it, and the later kernels get
    share = 1/total, p's factor from there on, and delta as these p give it, Σ_j p dp, in place of
    the rounded out's. dq itself moves to that delta by Σ_j p k, one product more than otherwise:
    without it dq had up to 2.5 times the error that the number contract allows in float32, and 6
    times in 16 bits under a bias that leaves a row one key.
    """
    tiles = tl.cdiv(S, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b = head // H
    h = head % H
    if RIGHT:
        tile = tiles - 1 - tile
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
    origin = start_q + first.to(tl.int64)
    if VARLEN:
        limit = tl.where(first < S, limit, 0)  # a tile without queries sees nothing
        head = h
    if LENGTHS:
        limit = tl.minimum(T, tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0))
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
        q_ptr + b * q_strides[0] + h * q_strides[1] + origin * q_strides[2],
        local[:, None] * q_strides[2] + d[None, :], i[:, None], S, d[None, :], True, D, BLOCK_D,
    )  # fmt: skip
    grad = load_tile(
        grad_ptr + b * grad_strides[0] + h * grad_strides[1] + origin * grad_strides[2],
        local[:, None] * grad_strides[2] + e[None, :], i[:, None], S, e[None, :], True, E, BLOCK_E,
    )  # fmt: skip
    rows_ptr += head * 3 * R + start_q
    lse = tl.load(rows_ptr + i, mask=i < S, other=float("inf"))
    delta = tl.load(rows_ptr + 2 * R + i, mask=i < S, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(first + BLOCK_M, S) - 1
    lo, full_lo, full_hi, hi = key_runs(
        first, last, limit, shift, left, right, LEFT, RIGHT, BLOCK_N
    )
    if LEFT:
        dq, mean, total, excess = _walk_keys(
            dq, mean, total, excess, q, grad, i, lse, delta, k_ptr, v_ptr, k_strides[2],
            v_strides[2], mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left,
            right, slope, softcap, scale, seed, position, threshold, keep_scale, lo, full_lo, D, E,
            HAS_MASK, HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, WIDE, BLOCK_N, BLOCK_D,
            BLOCK_E, UNIT, True,
        )  # fmt: skip
    dq, mean, total, excess = _walk_keys(
        dq, mean, total, excess, q, grad, i, lse, delta, k_ptr, v_ptr, k_strides[2], v_strides[2],
        mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope,
        softcap, scale, seed, position, threshold, keep_scale, full_lo, full_hi, D, E, HAS_MASK,
        HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, WIDE, BLOCK_N, BLOCK_D, BLOCK_E, UNIT,
        False,
    )  # fmt: skip
    dq, mean, total, excess = _walk_keys(
        dq, mean, total, excess, q, grad, i, lse, delta, k_ptr, v_ptr, k_strides[2], v_strides[2],
        mask_ptr, bias_ptr, mask_steps, bias_steps, S, T, limit, shift, left, right, slope,
        softcap, scale, seed, position, threshold, keep_scale, full_hi, hi, D, E, HAS_MASK,
        HAS_BIAS, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, WIDE, BLOCK_N, BLOCK_D, BLOCK_E, UNIT, True,
    )  # fmt: skip
    if UNIT == 1.0:
        if SINKS:
            x = tl.load(sinks_ptr + h).to(tl.float32) - lse
            sink = tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
            total += sink
            excess -= sink * delta  # its dp is 0
        share = 1.0 / tl.where(total == 0.0, 1.0, total)  # 0: a query without keys
        step = excess * share
        if HAS_GRAD_LSE:
            step -= tl.load(grad_lse_ptr + head * R + start_q + i, mask=i < S, other=0.0)
        dq = (dq - mean * step[:, None]) * share[:, None]
        tl.store(rows_ptr + R + i, share, mask=i < S)
        tl.store(rows_ptr + 2 * R + i, delta + step, mask=i < S)
    dq_ptr += b * dq_strides[0] + h * dq_strides[1] + origin * dq_strides[2]
    tl.store(
        dq_ptr + local[:, None] * dq_strides[2] + d[None, :],
        (dq * d_scale).to(dq_ptr.dtype.element_ty),
        mask=(i < S)[:, None] & (d < D)[None, :],
    )


@triton.jit
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, partial_ptr, mask_ptr, bias_ptr, slopes_ptr,
    lengths_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, q_strides, k_strides, v_strides, grad_strides,
    mask_strides, bias_strides, slope_strides, H, group, S, T, R, OB, OH, OS, OT, RB, RH, RS, RT,
    per_split, shift, left, right, softcap, scale, threshold, keep_scale,
    D: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr, DROPOUT: tl.constexpr, SUM_S: tl.constexpr, SUM_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Of a bias (OB, OH, OS, OT), one tile's share: RB·RH·RS·RT (batch, head, tile)s lie on it."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    tiles_m = tl.cdiv(OS, BLOCK_M)
    tiles_n = tl.cdiv(OT, BLOCK_N)
    place = tl.program_id(0).to(tl.int64)
    out_j = place % tiles_n
    place = place // tiles_n
    out_i = place % tiles_m
    place = place // tiles_m
    out_h = place % OH
    place = place // OH
    out_b = place % OB
    split = place // OB
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = split * per_split
    for r in range(begin, tl.minimum(begin + per_split, RB * RH * RS * RT)):
        tile_n = out_j + r % RT
        rest = r // RT
        tile_m = out_i + rest % RS
        rest = rest // RS
        h = out_h + rest % RH
        b = out_b + rest // RH
        head = b * H + h
        first_i = tile_m * BLOCK_M
        first_j = tile_n * BLOCK_N
        position = head * S
        queries, limit, offset, start_q, start_k = sequence_of(
            cu_q_ptr, cu_k_ptr, b, S, T, shift, VARLEN
        )  # fmt: skip
        if VARLEN:
            head = h
        if LENGTHS:
            limit = tl.minimum(T, tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0))
        needed = (first_j < limit) & (first_i < queries)
        if RIGHT:
            needed = needed & (first_j <= first_i + BLOCK_M - 1 + offset + right)
        if LEFT:
            needed = needed & (first_j + BLOCK_N - 1 >= first_i + offset - left)
        if needed:
            i = first_i.to(tl.int32) + m
            j = first_j.to(tl.int32) + n
            row = start_q + i.to(tl.int64)
            column = start_k + j.to(tl.int64)
            slope = 0.0
            if ALIBI:
                at = b * slope_strides[0] + h * slope_strides[1]
                slope = tl.load(slopes_ptr + at).to(tl.float32) * UNIT
            mask_at = mask_ptr
            mask_steps = (0, 0)
            if HAS_MASK:
                mask_at = mask_ptr + (b * mask_strides[0] + h * mask_strides[1])
                mask_steps = (mask_strides[2], mask_strides[3])
            q = load_tile(
                q_ptr + b * q_strides[0] + h * q_strides[1],
                row[:, None] * q_strides[2] + d[None, :], i[:, None], queries, d[None, :], True,
                D, BLOCK_D,
            )  # fmt: skip
            grad = load_tile(
                grad_ptr + b * grad_strides[0] + h * grad_strides[1],
                row[:, None] * grad_strides[2] + e[None, :], i[:, None], queries, e[None, :],
                True, E, BLOCK_E,
            )  # fmt: skip
            k = load_tile(
                k_ptr + b * k_strides[0] + (h // group) * k_strides[1],
                column[None, :] * k_strides[2] + d[:, None], j[None, :], limit, d[:, None], True, D,
                BLOCK_D,
            )  # fmt: skip
            v = load_tile(
                v_ptr + b * v_strides[0] + (h // group) * v_strides[1],
                column[None, :] * v_strides[2] + e[:, None], j[None, :], limit, e[:, None], True, E,
                BLOCK_E,
            )  # fmt: skip
            qk = dot(q, k)
            dp = dot(grad, v)
            lse, share, delta = _load_rows(
                rows_ptr + head * 3 * R + start_q, i, queries, R, UNIT
            )  # fmt: skip
            _, _, ds, _ = _gradient_tile(
                qk, dp, i[:, None], j[None, :], lse[:, None], share[:, None], delta[:, None],
                mask_at, bias_ptr + (b * bias_strides[0] + h * bias_strides[1]), mask_steps,
                (bias_strides[2], bias_strides[3]), queries, T, limit, offset, left, right, slope,
                softcap, scale, seed, position, threshold, keep_scale, HAS_MASK, True, LEFT, RIGHT,
                SOFTCAP, ALIBI, DROPOUT, UNIT, True,
            )  # fmt: skip
            acc += ds
    partial_ptr += ((split * OB + out_b) * OH + out_h) * OS * OT
    i = out_i * BLOCK_M + m
    j = out_j * BLOCK_N + n
    if SUM_S and SUM_T:
        tl.store(partial_ptr, tl.sum(tl.sum(acc, axis=1), axis=0))
    elif SUM_S:
        tl.store(partial_ptr + j, tl.sum(acc, axis=0), mask=j < OT)
    elif SUM_T:
        tl.store(partial_ptr + i, tl.sum(acc, axis=1), mask=i < OS)
    else:
        at = i[:, None] * OT + j[None, :]
        tl.store(partial_ptr + at, acc, mask=(i < OS)[:, None] & (j < OT)[None, :])
