"""Attention and its backward: tile sizes, and the operators that launch the kernels of
_attention.py (forward) and _attention_backward.py, which say how they work."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._attention import forward_kernel
from ._attention_backward import dbias_kernel, delta_kernel, dkdv_kernel, dq_kernel
from ._device import threshold_of
from ._reduce import sum_partials
from ._register import operator
from ._target import family

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, and pipeline stages of the loop."""

    m: int
    n: int
    warps: int
    stages: int


# Tiles by device family (_target.py) and head size (the larger of D and E, as a power of two).
# Reasoned, not measured: FlashAttention-2's own sizes for sm_80, those of Triton's fused-attention
# tutorial for sm_90, cut down to 64 KB of shared memory for AMD and 99 KB for small NVIDIA parts;
# then checked with ptxas for spills and with Triton's report for shared memory, without a GPU.
# float32 runs on FMA units ("ieee", the number contract), where registers are the limit.
FORWARD = {
    "sm_90": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "sm_80": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
    "small": {64: Tile(128, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 4, 2)},
    "hip": {64: Tile(128, 64, 4, 1), 128: Tile(128, 32, 4, 1), 256: Tile(64, 32, 4, 1)},
}
FORWARD_F32 = {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}
KEYS = {  # the kernel of dk and dv
    "sm_90": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(64, 32, 8, 1)},
    "sm_80": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
    "small": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 4, 1)},
    "hip": {64: Tile(32, 128, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
}
QUERIES = {  # the kernels of dq and dbias
    "sm_90": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    "sm_80": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    "small": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 4, 1)},
    "hip": {64: Tile(128, 32, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
}
BACKWARD_F32 = {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)}
INTERPRETED = Tile(32, 32, 4, 1)  # small, so that small tests meet every kind of tile
BIAS_PROGRAMS = 1024  # the work on a broadcast bias is split until about so many programs run
WIDE_STEP = 2**24  # a row stride from which offsets within a tile need 64 bits


def tile_for(
    table: dict[str, dict[int, Tile]], f32: dict[int, Tile], query: Tensor, head_dim: int
) -> Tile:
    kind = family(query)
    if kind == "interpreter":
        return INTERPRETED
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return f32[size] if query.dtype == torch.float32 else table[kind][size]


def lighter(tile: Tile) -> Tile:
    """Half the inner tile, for calls whose mask, bias or random bits take registers too."""
    return tile._replace(n=max(16, tile.n // 2))


def lighter_keys(tile: Tile) -> Tile:
    return tile._replace(m=max(16, tile.m // 2))


def heavy(options: dict[str, Any]) -> bool:
    return any(options[name] for name in ("HAS_MASK", "HAS_BIAS", "DROPOUT", "ALIBI", "SOFTCAP"))


def short(tile: Tile, queries: int) -> Tile:
    """The tile for few queries (decode): no more rows of a matrix instruction than are used."""
    rows = max(16, triton.next_power_of_2(queries))
    if rows >= tile.m:
        return tile
    return tile._replace(m=rows, warps=min(tile.warps, 4))


def block_of(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


class Packing(NamedTuple):
    """Where the sequences of packed (tokens, heads, head_dim) tensors begin."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Sizes(NamedTuple):
    """B, H, G, S, T, D, E as everywhere, S and T the longest lengths of packed sequences; and the
    number of rows that a head has in lse, (batches, H, rows)."""

    B: int
    H: int
    G: int
    S: int
    T: int
    D: int
    E: int
    rows: int
    batches: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> "Sizes":
        H, G, D, E = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        if packing is None:
            B, S = query.shape[0], query.shape[2]
            return cls(B, H, G, S, key.shape[2], D, E, S, B)
        sequences = packing.cu_seqlens_q.shape[0] - 1
        longest = packing.max_seqlen_q, packing.max_seqlen_k
        return cls(sequences, H, G, *longest, D, E, query.shape[0], 1)


def steps_of(x: Tensor) -> tuple[int, ...]:
    """Strides by (batch, head, row, column), also of (row, head, column)."""
    return x.stride() if x.dim() == 4 else (0, x.stride(1), x.stride(0), x.stride(2))


class _Call(NamedTuple):
    """What every kernel of one call is given."""

    runtime: dict[str, Any]
    options: dict[str, Any]


def _describe(
    sizes: Sizes, packing: Packing | None, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, bias: Tensor | None, is_causal: bool, bottom_right: bool, window_left: int,
    window_right: int, softcap: float, alibi_slopes: Tensor | None, key_lengths: Tensor | None,
    scale: float, dropout_p: float, seed: Tensor | None, others: tuple[Tensor, ...],
    exact_rows: bool,
) -> _Call:  # fmt: skip
    H, S, T = sizes.H, sizes.S, sizes.T
    if is_causal:  # a window with nothing to the right
        window_right = 0 if window_right < 0 else min(window_right, 0)
    natural = query.dtype == torch.float32 or bias is not None or exact_rows
    unit = 1.0 if natural else LOG2_E  # see _attention.py and dq_kernel
    folded = scale / softcap if softcap else scale * unit
    runtime = {
        "mask_ptr": mask, "bias_ptr": bias, "slopes_ptr": alibi_slopes, "lengths_ptr": key_lengths,
        "seed_ptr": seed, "cu_q_ptr": packing and packing.cu_seqlens_q,
        "cu_k_ptr": packing and packing.cu_seqlens_k, "mask_strides": _strides(mask),
        "bias_strides": _strides(bias),
        "slope_strides": _strides(alibi_slopes), "H": H, "group": H // sizes.G, "S": S, "T": T,
        "R": sizes.rows, "shift": 0 if not bottom_right else T - S if packing is None else 1,
        "left": min(window_left, S + T), "right": min(window_right, S + T),
        "softcap": softcap * unit, "scale": folded,
        "threshold": threshold_of(dropout_p), "keep_scale": 1.0 / (1.0 - dropout_p),
    }  # fmt: skip
    wide = max(steps_of(x)[2] for x in (query, key, value, *others)) >= WIDE_STEP
    options = {
        "D": sizes.D, "E": sizes.E, "HAS_MASK": mask is not None,
        "HAS_BIAS": bias is not None, "LEFT": window_left >= 0, "RIGHT": window_right >= 0,
        "SOFTCAP": softcap != 0.0, "ALIBI": alibi_slopes is not None,
        "LENGTHS": key_lengths is not None, "DROPOUT": seed is not None, "WIDE": wide, "UNIT": unit,
        "VARLEN": packing is not None, "BLOCK_D": block_of(sizes.D), "BLOCK_E": block_of(sizes.E),
    }  # fmt: skip
    return _Call(runtime, options)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) if x is None else x.stride()


def _heads_last(like: Tensor, x: Tensor, dim: int) -> Tensor:
    """An empty (batch, heads, length, dim) whose memory is (batch, length, heads, dim); or packed
    (tokens, heads, dim)."""
    if x.dim() == 3:
        return like.new_empty((*x.shape[:2], dim))
    batch, heads, length, _ = x.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    is_causal: bool, bottom_right: bool, window_left: int, window_right: int, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, key_lengths: Tensor | None, scale: float,
    dropout_p: float, seed: Tensor | None, *, at_end: bool = False, packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention; with ``at_end`` attention_decode, whose queries are the last tokens; with
    ``packing`` attention_varlen."""
    sizes = Sizes.of(query, key, value, packing)
    B, H, _, S, T, D, E, rows, batches = sizes
    out = _heads_last(query, query, E)
    shape = (batches, H, rows) if packing is None else (H, rows)
    lse = query.new_empty(shape, dtype=torch.float32)
    if lse.numel() == 0 or B * S == 0:
        return out, lse
    if T == 0:
        alone = float("-inf") if sinks is None else sinks.float()[:, None]
        return out.zero_(), lse.copy_(torch.as_tensor(alone, device=lse.device))
    call = _describe(
        sizes, packing, query, key, value, mask, bias, is_causal, bottom_right, window_left,
        window_right, softcap, alibi_slopes, key_lengths, scale, dropout_p, seed, (out,), False,
    )  # fmt: skip
    tile = tile_for(FORWARD, FORWARD_F32, query, max(D, E))
    tile = short(lighter(tile) if heavy(call.options) else tile, S)
    forward_kernel[(triton.cdiv(S, tile.m) * B * H,)](
        q_ptr=query, k_ptr=key, v_ptr=value, out_ptr=out, lse_ptr=lse, sinks_ptr=sinks,
        q_strides=steps_of(query), k_strides=steps_of(key), v_strides=steps_of(value),
        out_strides=steps_of(out), SINKS=sinks is not None, AT_END=at_end, BLOCK_M=tile.m,
        BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **call.runtime,
        **call.options,
    )  # fmt: skip
    return out, lse


@operator("out", "lse")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return forward(
        query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
        alibi_slopes, sinks, key_lengths, scale, dropout_p, seed,
    )  # fmt: skip


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool,
    bottom_right: bool, window_left: int, window_right: int, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, key_lengths: Tensor | None, scale: float,
    dropout_p: float, seed: Tensor | None, bias_grad: bool, sinks_grad: bool,
    packing: Packing | None = None,
) -> Gradients:  # fmt: skip
    """attention_backward, or with ``packing`` attention_varlen_backward."""
    sizes = Sizes.of(query, key, value, packing)
    B, H, G, S, T, D, E, R, batches = sizes
    d_query, d_key = _heads_last(query, query, D), _heads_last(query, key, D)
    d_value = _heads_last(query, value, E)
    d_bias = query.new_empty(_own_shape(bias) if bias_grad else (0,), dtype=torch.float32)
    d_sinks = query.new_empty((H if sinks_grad else 0,), dtype=torch.float32)
    if lse.numel() == 0 or B * S * T == 0:
        for empty in (d_query, d_key, d_value, d_bias, d_sinks):
            empty.zero_()
        if sinks_grad and sinks is not None and grad_lse is not None:  # where lse is the sink
            d_lse = grad_lse.view(batches, H, R).masked_fill(sinks[:, None] == float("-inf"), 0.0)
            d_sinks.copy_(d_lse.sum((0, 2)))
        return d_query, d_key, d_value, d_bias, d_sinks
    call = _describe(
        sizes, packing, query, key, value, mask, bias, is_causal, bottom_right, window_left,
        window_right, softcap, alibi_slopes, key_lengths, scale, dropout_p, seed,
        (grad_out, d_query, d_key, d_value), sinks_grad,
    )  # fmt: skip
    rows = lse.new_empty(
        (batches, H, 3, R)
    )  # lse in the unit of scores, share, delta: see dq_kernel
    queries = tile_for(QUERIES, BACKWARD_F32, query, max(D, E))
    keys = tile_for(KEYS, BACKWARD_F32, query, max(D, E))
    if heavy(call.options):
        queries, keys = lighter(queries), lighter_keys(keys)
    elif packing is not None:
        keys = lighter_keys(keys)  # the sequence's own numbers take registers too
    delta_kernel[(triton.cdiv(R, queries.m) * batches * H,)](
        out, grad_out, lse, grad_lse, rows, steps_of(out), steps_of(grad_out), H, R, E=E,
        HAS_GRAD_LSE=grad_lse is not None, BLOCK_M=queries.m, BLOCK_E=block_of(E),
        UNIT=call.options["UNIT"], num_warps=4,
    )  # fmt: skip
    shared = {
        "q_ptr": query, "k_ptr": key, "v_ptr": value, "grad_ptr": grad_out, "rows_ptr": rows,
        "q_strides": steps_of(query), "k_strides": steps_of(key), "v_strides": steps_of(value),
        "grad_strides": steps_of(grad_out), **call.runtime,
    }  # fmt: skip
    d_scale = scale  # of qk: with a softcap its derivative, times scale
    dq_kernel[(triton.cdiv(S, queries.m) * B * H,)](
        grad_lse_ptr=grad_lse, sinks_ptr=sinks, dq_ptr=d_query, dq_strides=steps_of(d_query),
        d_scale=d_scale, HAS_GRAD_LSE=grad_lse is not None, SINKS=sinks is not None,
        BLOCK_M=queries.m, BLOCK_N=queries.n, num_warps=queries.warps, num_stages=queries.stages,
        **shared, **call.options,
    )  # fmt: skip
    dkdv_kernel[(triton.cdiv(T, keys.n) * B * G,)](
        dk_ptr=d_key, dv_ptr=d_value, dk_strides=steps_of(d_key), dv_strides=steps_of(d_value),
        d_scale=d_scale, BLOCK_M=keys.m, BLOCK_N=keys.n, num_warps=keys.warps,
        num_stages=keys.stages, **shared, **call.options,
    )  # fmt: skip
    if bias_grad:
        assert bias is not None
        _bias_gradient(d_bias, sizes, queries, shared, call.options)
    if sinks_grad:
        assert sinks is not None
        # The sink's probability has no value: its score's gradient is −p · delta.
        lse = lse.view(batches, H, R)
        p = torch.exp((sinks.float()[:, None] - lse).clamp_(max=0.0)).mul_(rows[:, :, 1])
        p.masked_fill_(lse == float("-inf"), 0.0)
        torch.sum(p.mul_(rows[:, :, 2]).neg_(), dim=(0, 2), out=d_sinks)
    return d_query, d_key, d_value, d_bias, d_sinks


@operator("d_query", "d_key", "d_value", "d_bias", "d_sinks")
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(
        grad_out, grad_lse, query, key, value, out, lse, mask, bias, is_causal, bottom_right,
        window_left, window_right, softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p,
        seed, bias_grad, sinks_grad,
    )  # fmt: skip


def _own_shape(bias: Tensor | None) -> tuple[int, ...]:
    """The shape of a bias before it was expanded."""
    assert bias is not None
    return tuple(
        1 if step == 0 and size > 1 else size for size, step in zip(bias.shape, bias.stride())
    )


def _bias_gradient(
    d_bias: Tensor,
    sizes: Sizes,
    tile: Tile,
    shared: dict[str, Any],
    options: dict[str, Any],
) -> None:
    B, H, _, S, T, *_ = sizes
    OB, OH, OS, OT = d_bias.shape
    repeats = {
        "RB": B // OB,
        "RH": H // OH,
        "RS": triton.cdiv(S, tile.m) if OS < S else 1,
        "RT": triton.cdiv(T, tile.n) if OT < T else 1,
    }
    places = OB * OH * triton.cdiv(OS, tile.m) * triton.cdiv(OT, tile.n)
    count = repeats["RB"] * repeats["RH"] * repeats["RS"] * repeats["RT"]
    splits = min(count, max(1, BIAS_PROGRAMS // places))
    per_split = triton.cdiv(count, splits)
    splits = triton.cdiv(count, per_split)
    partial = d_bias if splits == 1 else d_bias.new_empty((splits, *d_bias.shape))
    options = {k: v for k, v in options.items() if k not in ("HAS_BIAS", "WIDE")}
    dbias_kernel[(places * splits,)](
        partial_ptr=partial, OB=OB, OH=OH, OS=OS, OT=OT, **repeats, per_split=per_split,
        SUM_S=OS < S, SUM_T=OT < T, BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
        num_stages=1, **shared, **options,
    )  # fmt: skip
    if splits > 1:
        sum_partials(partial, d_bias)
