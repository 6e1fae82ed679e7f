r"""Scaled dot-product attention: each query takes a weighted mean of the values.

    s[i,j] = scale * <q[i], k[j]>                          scale = 1/sqrt(D) unless given
    s      = softcap * tanh(s / softcap)                   if softcap
    s[i,j] = s[i,j] - slope * |j - i'| + bias[i,j]         ALiBi, additive bias
    s[i,j] = -inf   where (i,j) is masked                  mask, causal, window, key_lengths
    lse[i] = log(sum_j exp(s[i,j]) + exp(sink))            sink: one extra logit without a value
    out[i] = sum_j dropout(exp(s[i,j] - lse[i])) v[j]

i' = i for causal_alignment "top_left", i + T - S for "bottom_right" (the last query then sits on
the last key). Causal keeps j <= i'; window (left, right) keeps i' - left <= j <= i' + right.

Shapes: query (B,H,S,D), key (B,G,T,D), value (B,G,T,E), out (B,H,S,E), lse (B,H,S). G divides H:
query head h reads key head h // (H/G). Memory is S x T here: this is the textbook; the kernels'
memory is linear.

Masked means False in `mask`, -inf in `bias` (any other number is a number, finfo.min too), or cut
off by the causal rule, the window or `key_lengths`. Masked scores are replaced, not added to, so
a masked key never affects the result. A query without any key gives out 0 and gradient 0; its
lse is its sink, or -inf where it has none, so that parts of the keys, the sinks given to one of
them, can be merged. Keys that no query sees (those past `key_lengths` among them) do not affect the
result. A key that only some queries see and that holds NaN or inf in its *value* gives the others
0 * NaN = NaN; in its key, it leaves their output alone but not their query's gradient.

Sources: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762); grouped heads:
Ainslie et al., 2023 (2305.13245); ALiBi: Press et al., 2022 (2108.12409); window: Beltagy et al.,
2020 (2004.05150); softcap: Gemma 2, 2024 (2408.00118); sinks: Xiao et al., 2023 (2309.17453).

>>> query = key = torch.eye(3, dtype=torch.float64)[None, None]
>>> value = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)[None, None]
>>> attention(query, key, value, is_causal=True, scale=0.0).flatten()  # running means
tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
"""

import math
from typing import Any

import torch
from torch import Tensor

from fasttransformer.reference.dropout import dropout_mask, new_seed
from fasttransformer.reference.precision import compute_dtype, matmul


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Any:
    """Attention with every option; see the top of this file.

    mask (bool, True = takes part) and bias (float) broadcast to (B,H,S,T); alibi_slopes is (H,) or
    (B,H), sinks (H,), key_lengths (B,). Returns out (B,H,S,E) in the query's dtype, or (out, lse)
    with lse (B,H,S) in float32 (float64 for float64 inputs). `seed` fixes the dropout mask.

    >>> query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    >>> out, lse = attention(query, key, value, key_lengths=torch.tensor([3]), return_lse=True)
    >>> torch.allclose(out, attention(query, key[:, :, :3], value[:, :, :3]), atol=1e-6)
    True
    """
    shift = key.shape[-2] - query.shape[-2] if causal_alignment == "bottom_right" else 0
    keep = None
    if dropout_p > 0.0:
        shape = (*query.shape[:-1], key.shape[-2])
        keep = dropout_mask(new_seed(query) if seed is None else seed, shape, dropout_p)
    out, lse = attend_at(
        query, key, value, shift,
        mask=mask, bias=bias, is_causal=is_causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, key_lengths=key_lengths, scale=scale,
        keep=keep, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: query (..., S, D), any leading dimensions.

    attn_mask is bool (True = takes part) or float (added); is_causal is top-left. Of four
    dimensions both may be given, and both apply.

    >>> query, key, value = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64).unbind()
    >>> torchs = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    >>> torch.allclose(scaled_dot_product_attention(query, key, value), torchs)
    True
    """
    if attn_mask is not None and is_causal and query.ndim != 4:
        raise ValueError("scaled_dot_product_attention: attn_mask and is_causal exclude each other")
    if dropout_p == 1.0:  # everything is dropped; NaN stays, as in torch
        return 0.0 * scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    allowed = bias = keep = None
    if is_causal:
        allowed = relative_positions(query, key) <= 0
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask
    else:
        bias = attn_mask
    if dropout_p > 0.0:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        shape = (*leading, query.shape[-2], key.shape[-2])
        keep = dropout_mask(new_seed(query) if seed is None else seed, shape, dropout_p)
    return attend(
        query, key, value, scale=scale, allowed=allowed, bias=bias, keep=keep, dropout_p=dropout_p
    )[0]


def relative_positions(query: Tensor, key: Tensor, shift: int | Tensor = 0) -> Tensor:
    """j - i', the key's position as its query sees it: (S,T), or (B,1,S,T) for shift (B,1,1,1)."""
    i = torch.arange(query.shape[-2], device=query.device)[:, None]
    j = torch.arange(key.shape[-2], device=query.device)
    return j - (i + shift)


def attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shift: int | Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries that stand at positions i' = i + shift; shift may differ per sample.

    This turns every rule about positions into one bool mask and one additive bias.
    """
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if group != 1:
        key, value = (kv.repeat_interleave(group, dim=1) for kv in (key, value))

    rules = [] if mask is None else [mask]
    distance = relative_positions(query, key, shift)
    left, right = window if window is not None else (None, None)
    if is_causal:
        rules.append(distance <= 0)
    if left is not None:
        rules.append(distance >= -left)
    if right is not None:
        rules.append(distance <= right)
    if key_lengths is not None:
        j = torch.arange(key.shape[-2], device=key.device)
        rules.append(j < key_lengths.view(-1, 1, 1, 1))
    allowed = None
    for rule in rules:
        allowed = rule if allowed is None else allowed & rule

    if alibi_slopes is not None:
        slopes = alibi_slopes.to(compute_dtype(query))[..., None, None]  # (H,1,1) or (B,H,1,1)
        alibi = -slopes * distance.abs()
        bias = alibi if bias is None else alibi + bias

    return attend(
        query, key, value, scale=scale, softcap=softcap, bias=bias, allowed=allowed,
        sinks=None if sinks is None else sinks.view(-1, 1, 1),
        keep=keep, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formula itself: query (..., S, D), key (..., T, D), value (..., T, E)."""
    dtype, wide = query.dtype, compute_dtype(query)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))

    empty = None  # queries that see no key
    if bias is not None:
        bias = torch.atleast_2d(bias).to(wide)
        allowed = bias != -math.inf if allowed is None else allowed & (bias != -math.inf)
    if key.shape[-2] == 0:
        allowed = torch.zeros(1, 0, dtype=torch.bool, device=query.device)
    if allowed is not None:
        allowed = torch.atleast_2d(allowed)
        empty = ~allowed.any(dim=-1, keepdim=True)
        unseen = ~allowed.any(dim=-2).unsqueeze(-1)
        # What takes no part must not reach a gradient as 0 * NaN either.
        query = torch.where(empty, 0.0, query)
        key, value = torch.where(unseen, 0.0, key), torch.where(unseen, 0.0, value)

    scores = matmul(query, key.transpose(-2, -1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None and empty is not None:
        scores = torch.where(allowed, scores, -math.inf)
        scores = torch.where(empty, 0.0, scores)  # any number: softmax of -inf alone is NaN
    alone: float | Tensor = -math.inf  # lse of a query without keys
    if sinks is not None:
        sink = sinks.to(wide).expand(*scores.shape[:-1], 1)
        alone = sink.squeeze(-1)
        if empty is not None:
            sink = torch.where(empty, 0.0, sink)  # likewise
        scores = torch.cat([scores, sink], dim=-1)

    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    if empty is not None:
        weights = torch.where(empty, 0.0, weights)
    if keep is not None:
        weights = torch.where(keep, weights / (1.0 - dropout_p), 0.0)
    out = matmul(weights, value).to(dtype)

    if not return_lse:
        return out, None
    lse = torch.logsumexp(scores, dim=-1)
    if empty is not None:
        lse = torch.where(empty.squeeze(-1), alone, lse)
    return out, lse
