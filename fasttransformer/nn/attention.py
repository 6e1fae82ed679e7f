"""MultiheadAttention: packed projection, attention on strided views of it, projection back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.linear_add import linear_add
from ..ops.softmax import softmax
from ._drop_in import DropIn
from ._fallback import record
from ._masks import attention_masks
from ._plain import kernels_take, odd_parameter, parameter, run_torchs


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    r"""Drop-in :class:`torch.nn.MultiheadAttention`: same constructor, call and ``state_dict``.

    .. math::
        \text{head}_h = \text{softmax}\Big(\frac{Q_h K_h^\top}{\sqrt{D}} + \text{mask}\Big) V_h,
        \qquad \text{out} = [\text{head}_1, \dots, \text{head}_H]\, W_O^\top + b_O

    Self-attention projects with one matrix product, and the kernels read the heads where it left
    them: nothing is transposed or copied. Without weights, memory grows linearly with the lengths.

    The differences from torch are these. A query that may see no key (a fully padded sample, a
    masked row) gets weights 0 and the output projection's bias, where torch gives NaN. Weights,
    when asked for, are those after dropout in training, as torch's are, and so may exceed 1.
    ``is_causal=True`` is a hint, as in torch: it says that ``attn_mask`` is the causal mask.

    A module that torch built becomes this one by ``module.__class__ = ft.nn.MultiheadAttention``;
    :func:`fasttransformer.swap` does that. Cases that are not covered (nested tensors, tracing,
    dropout of 1) run torch's own forward; :func:`fasttransformer.nn.fallbacks` lists them.

    Args:
        embed_dim: size E of query, output and, unless kdim and vdim say otherwise, key and value.
        num_heads: H; it divides ``embed_dim``.
        dropout: probability of dropping a weight in training.
        bias: whether the projections have biases.
        add_bias_kv: appends a learned key and value that every query sees.
        add_zero_attn: appends a key and value of zeros that every query sees.
        kdim: features of key.
        vdim: features of value.
        batch_first: inputs and output are (batch, length, features), else lengths come first.

    Shapes:
        query (B, L, E), key (B, S, kdim), value (B, S, vdim), or with L and S before B, or without
        B; ``attn_mask`` (L, S) or (B·H, L, S); ``key_padding_mask`` (B, S) or (S,). Bool masks are
        True where a key is *left out*; float masks of any float dtype are added to the scores.
        Returns the output, shaped like query, and the weights: (B, L, S), (B, H, L, S) with
        ``average_attn_weights=False``, None with ``need_weights=False``.

    Raises:
        ValueError: shapes that don't fit, before anything is computed.
        TypeError: a mask that is neither bool nor floating point.

    Source: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), section 3.2.2.

    >>> import torch, fasttransformer as ft
    >>> attention = ft.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> padding = torch.tensor([[False] * 5, [True] * 5])
    >>> out, weights = attention(x, x, x, key_padding_mask=padding)
    >>> out.shape, weights.shape, weights[1].abs().max().item()
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), 0.0)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None); see the class and :class:`torch.nn.MultiheadAttention`."""
        parameters = self._parameters.values()
        if not kernels_take(
            nn.MultiheadAttention, query, key, value, attn_mask, key_padding_mask, *parameters
        ):
            return run_torchs(
                self, super().forward, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        reason = why_not(self)
        if reason is not None:
            record(self, reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        context, weights = heads_output(
            self, query, key, value, key_padding_mask, attn_mask, is_causal, need_weights,
            average_attn_weights,
        )  # fmt: skip
        out_proj = self.out_proj
        return linear_add(context, out_proj.weight, out_proj.bias), weights


def why_not(mha: nn.MultiheadAttention) -> str | None:
    """Why our kernels can't do what torch's forward may be able to do, or None."""
    if mha.training and mha.dropout >= 1.0:
        return f"dropout of {mha.dropout}"
    bias_k, bias_v = parameter(mha, "bias_k"), parameter(mha, "bias_v")
    if bias_k is not None or bias_v is not None:
        shape = (1, 1, mha.embed_dim)
        if bias_k is None or bias_v is None or bias_k.shape != shape or bias_v.shape != shape:
            return "bias_k and bias_v are not both of shape (1, 1, embed_dim)"
    added = odd_parameter(mha._modules["out_proj"])  # type: ignore[arg-type]
    return None if added is None else f"out_proj {added}"


def heads_output(
    mha: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool = False,
    average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Joined heads before the output projection, laid out like ``query``, and the weights.

    ``mha`` may be torch's own module too: only what torch's constructor sets is used.
    """
    heads, embed_dim = mha.num_heads, mha.embed_dim
    batched = query.dim() == 3
    batch_first = mha.batch_first or not batched
    _check_shapes(mha, query, key, value)
    if is_causal and attn_mask is None:
        raise ValueError(
            "MultiheadAttention: is_causal=True is a hint that attn_mask is the causal mask, so "
            "attn_mask must be given (nn.Transformer.generate_square_subsequent_mask makes it)"
        )
    if not batched:
        if key_padding_mask is not None and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        # The identity of the three inputs tells how many products the projection takes.
        if query is key and key is value:
            query = key = value = query.unsqueeze(0)
        elif key is value:
            query, key = query.unsqueeze(0), key.unsqueeze(0)
            value = key
        else:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)

    q, k, v = _project(mha, query, key, value, batch_first)  # each (B, H, length, D), strided
    batch, _, q_len, _ = q.shape
    k_len = k.shape[2]
    added = 0
    if mha.bias_k is not None and mha.bias_v is not None:
        k = torch.cat([k, _one_key(mha.bias_k, k)], dim=2)
        v = torch.cat([v, _one_key(mha.bias_v, v)], dim=2)
        added += 1
    if mha.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1

    if is_causal and not need_weights and key_padding_mask is None:
        attn_mask = None  # the hint stands for it, as in torch
    elif need_weights or added:
        is_causal = False  # the mask says it, and leaves the added keys open
    # else: the mask is merged with the padding, and the hint lets the kernel skip half the tiles
    mask = bias = None
    if attn_mask is not None or key_padding_mask is not None:
        mask, bias = attention_masks(
            attn_mask, key_padding_mask, batch, heads, q_len, k_len, added, q.dtype
        )
    dropout_p = mha.dropout if mha.training else 0.0
    weights = None
    if need_weights:
        out, weights = _attention_with_weights(q, k, v, mask, bias, dropout_p)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        weights = weights.to(q.dtype)
        if not batched:
            weights = weights.squeeze(0)
    else:
        out = attention(q, k, v, mask=mask, bias=bias, is_causal=is_causal, dropout_p=dropout_p)
    if not batched:
        return out.transpose(1, 2).reshape(q_len, embed_dim), weights
    if batch_first:  # a view: attention leaves its output as (B, L, H, D)
        return out.transpose(1, 2).reshape(batch, q_len, embed_dim), weights
    return out.permute(2, 0, 1, 3).reshape(q_len, batch, embed_dim), weights


def _check_shapes(mha: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    rank = len(q)
    if rank not in (2, 3) or len(k) != rank or len(v) != rank:
        raise ValueError(
            f"MultiheadAttention: query, key and value have shapes {tuple(q)}, {tuple(k)}, "
            f"{tuple(v)}; all must have 3 dimensions (batched) or all 2 (unbatched)"
        )
    if q[-1] != mha.embed_dim or k[-1] != mha.kdim or v[-1] != mha.vdim:
        raise ValueError(
            f"MultiheadAttention: query, key and value have {q[-1]}, {k[-1]} and {v[-1]} features; "
            f"embed_dim, kdim and vdim are {mha.embed_dim}, {mha.kdim} and {mha.vdim}"
        )
    batch = 0 if mha.batch_first else 1
    if rank == 3 and (q[batch] != k[batch] or k[batch] != v[batch]):
        raise ValueError(
            f"MultiheadAttention: query, key and value have shapes {tuple(q)}, {tuple(k)}, "
            f"{tuple(v)}; their batch (dimension {batch}) must be equal"
        )
    length = rank - 2 if rank == 2 or mha.batch_first else 0
    if k[length] != v[length]:
        raise ValueError(
            f"MultiheadAttention: key has length {k[length]}, but value has {v[length]} "
            f"(shapes {tuple(k)} and {tuple(v)})"
        )


def _project(
    mha: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
) -> tuple[Tensor, ...]:
    """q, k, v as (B, H, length, D) views of one, two or three products."""
    heads, embed_dim = mha.num_heads, mha.embed_dim
    bias = mha.in_proj_bias
    if mha.in_proj_weight is None:
        b_q, b_k, b_v = (None,) * 3 if bias is None else bias.chunk(3)
        return (
            *_split(linear_add(query, mha.q_proj_weight, b_q), 1, heads, batch_first),
            *_split(linear_add(key, mha.k_proj_weight, b_k), 1, heads, batch_first),
            *_split(linear_add(value, mha.v_proj_weight, b_v), 1, heads, batch_first),
        )
    weight = mha.in_proj_weight
    if key is value:
        if query is key:
            return _split(linear_add(query, weight, bias), 3, heads, batch_first)
        b_q, b_kv = (None, None) if bias is None else (bias[:embed_dim], bias[embed_dim:])
        return (
            *_split(linear_add(query, weight[:embed_dim], b_q), 1, heads, batch_first),
            *_split(linear_add(key, weight[embed_dim:], b_kv), 2, heads, batch_first),
        )
    w_q, w_k, w_v = weight.chunk(3)
    b_q, b_k, b_v = (None,) * 3 if bias is None else bias.chunk(3)
    return (
        *_split(linear_add(query, w_q, b_q), 1, heads, batch_first),
        *_split(linear_add(key, w_k, b_k), 1, heads, batch_first),
        *_split(linear_add(value, w_v, b_v), 1, heads, batch_first),
    )


def _split(projected: Tensor, parts: int, heads: int, batch_first: bool) -> tuple[Tensor, ...]:
    """(B, length, parts·E) or (length, B, parts·E) as ``parts`` views (B, H, length, D)."""
    first, second, features = projected.shape
    if parts == 1:
        x = projected.view(first, second, heads, features // heads)
        return (x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3),)
    # unbind rather than a permutation before it: its backward then writes the packed gradient once
    views = projected.view(first, second, parts, heads, features // (parts * heads)).unbind(2)
    if batch_first:
        return tuple(x.transpose(1, 2) for x in views)
    return tuple(x.permute(1, 2, 0, 3) for x in views)


def _one_key(vector: Tensor, like: Tensor) -> Tensor:
    """bias_k or bias_v (1, 1, E) as one more key (B, H, 1, D)."""
    batch, heads, _, head_dim = like.shape
    return vector.to(like.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1)


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """out (B, H, L, D) and the weights (B, H, L, S), which are the point and so are stored.

    A 16-bit product is slow on CPUs without 16-bit instructions, so it is widened there; the
    weights then come back in float32.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    scale = 1.0 / math.sqrt(q.shape[3])
    scores = q @ k.transpose(2, 3)
    if bias is None:
        weights = softmax(scores, scale=scale, mask=mask)
    else:
        allowed = bias != -math.inf  # so that a row of -inf alone gives 0 and not NaN
        scores = torch.add(bias, scores, alpha=scale)
        weights = softmax(scores, mask=allowed if mask is None else allowed & mask)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    out = weights.to(v.dtype) @ v
    return out.to(dtype), weights
