r"""Attention over a packed batch: sequences of different lengths, laid end to end, no padding.

Sequence b owns query tokens cu_seqlens_q[b] .. cu_seqlens_q[b+1] and the keys that cu_seqlens_k
says likewise; a query sees the keys of its own sequence only. Everything else is attention's:
positions, causal rule and window count from the start of each sequence, and a sequence without
keys gives out 0 and lse -inf (or the sink).

Shapes: query (tokens_q, H, D), key (tokens_k, G, D), value (tokens_k, G, E), cu_seqlens (B+1,)
int, starting with 0; out (tokens_q, H, E), lse (tokens_q, H). mask and bias broadcast to
(B, H, max_seqlen_q, max_seqlen_k), of which each sequence reads its corner; that padded shape also
numbers the positions for dropout.

Source: Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021
(arXiv:2107.02027).

>>> query = key = torch.zeros(3, 1, 4)
>>> value = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1)
>>> cu_seqlens = torch.tensor([0, 2, 3])
>>> attention_varlen(query, key, value, cu_seqlens, cu_seqlens).flatten()
tensor([2., 2., 5.])
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from fasttransformer.reference.attention import attend_at
from fasttransformer.reference.dropout import dropout_mask, new_seed
from fasttransformer.reference.precision import compute_dtype


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
    seed: Tensor | None = None,
) -> Any:
    """One call of attention per sequence; out, or (out, lse). See the top of this file."""
    bounds_q = list(itertools.pairwise(cu_seqlens_q.tolist()))
    bounds_k = list(itertools.pairwise(cu_seqlens_k.tolist()))
    if max_seqlen_q is None:
        max_seqlen_q = max((end - start for start, end in bounds_q), default=0)
    if max_seqlen_k is None:
        max_seqlen_k = max((end - start for start, end in bounds_k), default=0)

    keep = None
    if dropout_p > 0.0:
        shape = (len(bounds_q), query.shape[1], max_seqlen_q, max_seqlen_k)
        keep = dropout_mask(new_seed(query) if seed is None else seed, shape, dropout_p)

    # With no sequences at all, the result still hangs on the query, for autograd.
    outs = [query[:0, :, :0] @ query.new_empty(0, value.shape[2])]
    lses = [outs[0].sum(-1, dtype=compute_dtype(query))]
    for b, ((start_q, end_q), (start_k, end_k)) in enumerate(zip(bounds_q, bounds_k, strict=True)):
        length_q, length_k = end_q - start_q, end_k - start_k
        out, lse = attend_at(
            _batch_of_one(query, start_q, end_q),
            _batch_of_one(key, start_k, end_k),
            _batch_of_one(value, start_k, end_k),
            length_k - length_q if causal_alignment == "bottom_right" else 0,
            mask=_corner(mask, b, length_q, length_k),
            bias=_corner(bias, b, length_q, length_k),
            is_causal=is_causal, window=window, softcap=softcap,
            alibi_slopes=(
                alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.ndim == 2
                else alibi_slopes
            ),
            sinks=sinks, scale=scale,
            keep=_corner(keep, b, length_q, length_k), dropout_p=dropout_p, return_lse=True,
        )  # fmt: skip
        assert lse is not None
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return (torch.cat(outs), torch.cat(lses)) if return_lse else torch.cat(outs)


def _batch_of_one(packed: Tensor, start: int, end: int) -> Tensor:
    """(tokens, heads, D) to (1, heads, end - start, D)."""
    return packed[start:end].transpose(0, 1).unsqueeze(0)


def _corner(padded: Tensor | None, b: int, length_q: int, length_k: int) -> Tensor | None:
    """Sequence b's part of what broadcasts to (B, H, max_seqlen_q, max_seqlen_k)."""
    if padded is None:
        return None
    padded = padded.reshape((1,) * (4 - padded.ndim) + tuple(padded.shape))
    if padded.shape[0] > 1:
        padded = padded[b : b + 1]
    if padded.shape[2] > 1:
        padded = padded[:, :, :length_q]
    if padded.shape[3] > 1:
        padded = padded[:, :, :, :length_k]
    return padded
