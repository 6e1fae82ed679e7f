"""Attention over a packed batch: sequences of different lengths laid end to end, no padding."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._attention_checks import check_number, check_window, window_of
from ._attention_options import (
    check_options,
    d_bias_shape,
    expanded,
    kernel_bias,
    kernel_scale,
    kernel_sinks,
    kernel_slopes,
    kernel_softcap,
    needs_wide_inputs,
    option_names,
    own_bias_gradient,
)
from ._front import (
    GRAD_OPTIONS,
    autocast_dtype,
    cast,
    fake,
    is_float,
    last_stride_one,
    needs_grad,
    new_seed,
    probability,
    same_device,
    same_dtype,
)
from ._function import differentiable
from ._index import is_index


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Attention of each sequence of a packed batch over its own keys.

    .. math:: \text{out}[q_b : q_{b+1}] = \text{attention}(\text{query}[q_b : q_{b+1}],
        \text{key}[k_b : k_{b+1}], \text{value}[k_b : k_{b+1}])

    with q and k the boundaries ``cu_seqlens_q`` and ``cu_seqlens_k``. Every other rule is
    :func:`~fasttransformer.attention`'s; positions count from the start of each sequence. A
    sequence may be empty; a query without any key gives 0 and lse −inf, or its sink.

    Args:
        query: (tokens_q, heads, head_dim).
        key: (tokens_k, kv_heads, head_dim); kv_heads divides heads.
        value: (tokens_k, kv_heads, value_dim).
        cu_seqlens_q: (sequences + 1,) int: 0, then the end of each sequence; the last is tokens_q.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q, max_seqlen_k: the longest sequence or more; found unless given. On a GPU the
            boundaries are then not read back, which would wait for it, but checked by the kernel:
            a wrong one makes a later call of CUDA raise.
        mask, bias: broadcast to (sequences, heads, max_seqlen_q, max_seqlen_k), of which each
            sequence reads its corner.
        is_causal, causal_alignment, window, softcap, alibi_slopes, sinks, scale, dropout_p: as of
            :func:`~fasttransformer.attention`.
        return_lse: also return lse, (tokens_q, heads) float32.
        backend: forces one backend for this call.

    Returns:
        out (tokens_q, heads, value_dim), or (out, lse).

    Raises:
        TypeError: an input that is not floating point, dtypes that differ, boundaries that are no
            integers.
        ValueError: shapes that don't fit, boundaries that fall or leave the tokens, a value out of
            range.

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021
    (arXiv:2107.02027).

    >>> import torch, fasttransformer as ft
    >>> query = key = torch.zeros(3, 1, 4)
    >>> value = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1)
    >>> cu_seqlens = torch.tensor([0, 2, 3])
    >>> ft.attention_varlen(query, key, value, cu_seqlens, cu_seqlens).flatten()
    tensor([2., 2., 5.])
    """
    op = "attention_varlen"
    is_float(op, query=query, key=key, value=value)
    same_device(op, query, key=key, value=value)
    _check_shapes(op, query, key, value)
    max_seqlen_q = _check_boundaries(op, "q", cu_seqlens_q, "query", query, max_seqlen_q)
    max_seqlen_k = _check_boundaries(op, "k", cu_seqlens_k, "key", key, max_seqlen_k)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"{op}: cu_seqlens_q has {len(cu_seqlens_q)} entries, but cu_seqlens_k has "
            f"{len(cu_seqlens_k)}"
        )
    # Stand-ins without memory, of the shape that the batch would have if it were padded.
    sequences = len(cu_seqlens_q) - 1
    padded_q = query.new_empty(()).expand(sequences, query.shape[1], max_seqlen_q, query.shape[2])
    padded_k = key.new_empty(()).expand(sequences, key.shape[1], max_seqlen_k, key.shape[2])
    check_options(
        op, padded_q, padded_k, mask, bias, causal_alignment, window, softcap, alibi_slopes, sinks
    )
    left, right = check_window(op, window)
    check_number(op, "scale", scale)
    probability(op, dropout_p)
    autocast = autocast_dtype(query.device.type)
    if autocast is not None:
        query, key, value = cast(query, autocast), cast(key, autocast), cast(value, autocast)
    same_dtype(op, query, key=key, value=value)
    grad = needs_grad(query, key, value, bias, sinks, alibi_slopes)
    options = GRAD_OPTIONS[grad] | option_names(
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        bottom_right=causal_alignment == "bottom_right",
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_slopes_grad=alibi_slopes is not None and needs_grad(alibi_slopes),
        sinks=sinks,
        dropout=dropout_p > 0.0,
    )
    sizes = (("head_dim", max(query.shape[2], value.shape[2])),)
    kernel = choose(op, query.device.type, query.dtype, options, sizes, backend)
    seed = new_seed(query.device) if dropout_p > 0.0 else None
    if kernel.forward is None:
        return reference.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            window=window_of(left, right),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            dropout_p=dropout_p,
            return_lse=return_lse,
            seed=seed,
        )
    dtype = query.dtype
    if bias is not None:
        bias = kernel_bias(bias, query, grad)
    if grad and needs_wide_inputs(kernel, query, bias, sinks):
        query, key, value = query.float(), key.float(), value.float()
        bias = None if bias is None else bias.float()
    arguments = (
        last_stride_one(query),
        last_stride_one(key),
        last_stride_one(value),
        mask,
        bias,
        kernel_sinks(sinks),
        cu_seqlens_q.to(torch.int32).contiguous(),
        cu_seqlens_k.to(torch.int32).contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        causal_alignment == "bottom_right",
        left,
        right,
        kernel_softcap(softcap),
        kernel_slopes(alibi_slopes, sequences, query.shape[1]),
        kernel_scale(scale, query.shape[2]),
        dropout_p,
        seed,
        kernel,
    )
    if grad:
        out, lse = _differentiable(*arguments)
    else:
        out, lse = _AttentionVarlen.forward(*arguments)
    out = out.to(dtype)
    return (out, lse.t()) if return_lse else out


class _AttentionVarlen:
    @staticmethod
    def forward(query, key, value, mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                max_seqlen_k, is_causal, bottom_right, window_left, window_right, softcap,
                alibi_slopes, scale, dropout_p, seed, kernel):  # fmt: skip
        shape = (len(cu_seqlens_q) - 1, query.shape[1], max_seqlen_q, max_seqlen_k)
        return kernel.forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                              max_seqlen_k, expanded(mask, shape), expanded(bias, shape), is_causal,
                              bottom_right, window_left, window_right, softcap, alibi_slopes, sinks,
                              scale, dropout_p, seed)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        (query, key, value, mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
         max_seqlen_k, is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes,
         scale, dropout_p, seed, kernel) = inputs  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output, mask, bias, sinks, cu_seqlens_q,
                              cu_seqlens_k, alibi_slopes, seed)  # fmt: skip
        ctx.lengths = (max_seqlen_q, max_seqlen_k)
        ctx.numbers = (is_causal, bottom_right, window_left, window_right, softcap)
        ctx.factors = (scale, dropout_p)
        ctx.kernel = kernel

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        (query, key, value, out, lse, mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
         seed) = ctx.saved_tensors  # fmt: skip
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 20
            grad_out = torch.zeros_like(out)
        bias_grad, sinks_grad = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        shape = (len(cu_seqlens_q) - 1, query.shape[1], *ctx.lengths)
        d_query, d_key, d_value, d_bias, d_sinks = ctx.kernel.backward(
            last_stride_one(grad_out), None if grad_lse is None else grad_lse.contiguous(),
            query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.lengths,
            expanded(mask, shape), expanded(bias, shape), *ctx.numbers, alibi_slopes, sinks,
            *ctx.factors, seed, bias_grad, sinks_grad,
        )  # fmt: skip
        return (d_query, d_key, d_value, None,
                own_bias_gradient(d_bias, bias) if bias_grad else None,
                d_sinks if sinks_grad else None, *(None,) * 14)  # fmt: skip


_differentiable = differentiable(_AttentionVarlen, tensors=8)


@fake("attention_varlen")
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask, bias,
      is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes, sinks, scale,
      dropout_p, seed):  # fmt: skip
    tokens, heads, _ = query.shape
    return (query.new_empty((tokens, heads, value.shape[2])),
            query.new_empty((heads, tokens), dtype=torch.float32))  # fmt: skip


@fake("attention_varlen_backward")
def _(grad_out, grad_lse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
      max_seqlen_k, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
      alibi_slopes, sinks, scale, dropout_p, seed, bias_grad, sinks_grad):  # fmt: skip
    d_bias = d_bias_shape(bias) if bias_grad else [0]
    return (*(query.new_empty(x.shape) for x in (query, key, value)),
            query.new_empty(d_bias, dtype=torch.float32),
            query.new_empty([query.shape[1] * sinks_grad], dtype=torch.float32))  # fmt: skip


def _check_shapes(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}; it must have 3 dimensions, "
                "(tokens, heads, head_dim)"
            )
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"{op}: key has shape {tuple(key.shape)}, but value has "
            f"{tuple(value.shape)}; tokens and heads must be equal"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: key has {kv_heads} heads, which does not divide query's {heads} heads"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{op}: key has head_dim {key.shape[2]}, but query has {query.shape[2]}")


def _check_boundaries(
    op: str, side: str, cu_seqlens: Tensor, packed_name: str, packed: Tensor, most: int | None
) -> int:
    """The longest sequence's length, or ``most`` where that is given and right."""
    name = f"cu_seqlens_{side}"
    is_index(op, **{name: cu_seqlens})
    same_device(op, packed, **{name: cu_seqlens})
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(cu_seqlens.shape)}; it must be (sequences + 1,)"
        )
    if most is not None and (not packed.is_cpu or torch.compiler.is_compiling()):
        if most < 0:
            raise ValueError(f"{op}: max_seqlen_{side} is {most}; it must be 0 or more")
        return most  # to look at the boundaries would be to wait for the GPU; the kernel looks
    bounds, tokens = cu_seqlens.tolist(), packed.shape[0]
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"{op}: {name} goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to "
            f"{packed_name}'s number of tokens, {tokens}"
        )
    if lengths and min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise ValueError(
            f"{op}: {name} falls from {bounds[at]} to {bounds[at + 1]} at entry {at + 1}; "
            "no entry may be less than the one before"
        )
    longest = max(lengths, default=0)
    if most is not None and most < longest:
        raise ValueError(
            f"{op}: max_seqlen_{side} is {most}, but the longest sequence has {longest} tokens"
        )
    return longest if most is None else most
