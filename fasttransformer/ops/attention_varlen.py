"""Attention over a packed batch: sequences of different lengths laid end to end, no padding."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from .. import reference
from ..backends import choose
from ._attention_options import check_options, option_names
from ._front import autocast_dtype, cast, is_float, needs_grad, probability, same_device, same_dtype
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
    sequence may be empty; a query without any key gives 0 and lse −inf.

    Args:
        query: (tokens_q, heads, head_dim).
        key: (tokens_k, kv_heads, head_dim); kv_heads divides heads.
        value: (tokens_k, kv_heads, value_dim).
        cu_seqlens_q: (sequences + 1,) int: 0, then the end of each sequence; the last is tokens_q.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q, max_seqlen_k: the longest sequence or more; found unless given.
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
    longest_q = _longest(op, "cu_seqlens_q", cu_seqlens_q, "query", query)
    longest_k = _longest(op, "cu_seqlens_k", cu_seqlens_k, "key", key)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"{op}: cu_seqlens_q has {len(cu_seqlens_q)} entries, but cu_seqlens_k has "
            f"{len(cu_seqlens_k)}"
        )
    max_seqlen_q = _at_least(op, "max_seqlen_q", max_seqlen_q, longest_q)
    max_seqlen_k = _at_least(op, "max_seqlen_k", max_seqlen_k, longest_k)
    # Stand-ins without memory, of the shape that the batch would have if it were padded.
    sequences = len(cu_seqlens_q) - 1
    padded_q = query.new_empty(()).expand(sequences, query.shape[1], max_seqlen_q, query.shape[2])
    padded_k = key.new_empty(()).expand(sequences, key.shape[1], max_seqlen_k, key.shape[2])
    check_options(
        op, padded_q, padded_k, mask, bias, causal_alignment, window, softcap, alibi_slopes, sinks
    )
    probability(op, dropout_p)
    autocast = autocast_dtype(query.device.type)
    if autocast is not None:
        query, key, value = cast(query, autocast), cast(key, autocast), cast(value, autocast)
    same_dtype(op, query, key=key, value=value)
    options = option_names(
        grad=needs_grad(query, key, value, bias, sinks),
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        bottom_right=causal_alignment == "bottom_right",
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout=dropout_p > 0.0,
    )
    sizes = (("head_dim", max(query.shape[2], value.shape[2])),)
    choose(op, query.device.type, query.dtype, options, sizes, backend)
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
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )


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


def _longest(op: str, name: str, cu_seqlens: Tensor, packed_name: str, packed: Tensor) -> int:
    """The longest sequence's length, once the boundaries are known to be right."""
    is_index(op, **{name: cu_seqlens})
    same_device(op, packed, **{name: cu_seqlens})
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(cu_seqlens.shape)}; it must be (sequences + 1,)"
        )
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
    return max(lengths, default=0)


def _at_least(op: str, name: str, given: int | None, longest: int) -> int:
    if given is None:
        return longest
    if given < longest:
        raise ValueError(f"{op}: {name} is {given}, but the longest sequence has {longest} tokens")
    return given
