"""The layers of encoder and decoder over packed tokens, with every residual sum and norm fused.

A post-norm layer runs: projection, attention, output projection + residual + norm, linear +
activation, linear + residual + norm. In a pre-norm stack the norm at a block's entry is fused with
the sum before it, also across layers: a layer is handed the norm that follows it.

Sources: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762); pre-norm: Xiong et al.,
On Layer Normalization in the Transformer Architecture, 2020 (arXiv:2002.04745); ALiBi: Press, Smith
and Lewis, 2022 (arXiv:2108.12409); packed attention as in layers of FlashAttention's and NVIDIA
TransformerEngine's varlen kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..nn import FeedForward, LayerNorm, Linear, RotaryEmbedding
from ..nn._plain import plain_part
from ..nn._project import project_add_norm, project_norm
from ..nn.linear import LINEAR_FORWARDS
from ..nn.norms import NORM_FORWARDS
from ..ops._activation import dropout
from ..ops._derivatives import lasting
from ..ops.attention_varlen import attention_varlen
from .config import TransformerConfig
from .packing import PackedBatch

_kept_slopes: dict[tuple[int, torch.device], Tensor] = {}


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """(heads,) float32: 2^(-8 i / heads); for other heads than powers of two, those of the power
    below and every other one of the power above (Press et al., 2022, section 3 and code)."""
    if torch.compiler.is_compiling():
        return _slopes(heads, device)
    slopes = _kept_slopes.get((heads, device))
    if slopes is None:
        with lasting() as kept:
            slopes = _slopes(heads, device)
            if kept:
                _kept_slopes[heads, device] = slopes
    return slopes


def _slopes(heads: int, device: torch.device) -> Tensor:
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


class SelfAttention(nn.Module):
    """Attention of each packed sequence over itself, up to the output projection, which the layer
    fuses with what follows. (tokens, embed_dim) to (tokens, embed_dim)."""

    def __init__(self, config: TransformerConfig, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.is_causal, self.dropout = is_causal, config.dropout
        self.in_proj = Linear(config.embed_dim, 3 * config.embed_dim)
        self.out_proj = Linear(config.embed_dim, config.embed_dim)
        self.alibi = config.positions == "alibi"
        self.rotary = RotaryEmbedding(config.head_dim) if config.positions == "rotary" else None

    def project(self, x: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, each (tokens, heads, head_dim), turned to their positions."""
        projected = self.in_proj(x)
        heads = projected.view(x.shape[0], 3, self.num_heads, self.head_dim)
        query, key, value = heads.unbind(1)
        if self.rotary is not None and x.shape[0]:
            turned = self.rotary(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                batch.positions,
                max_position=batch.max_seqlen - 1,
            )
            query, key = (part[0].transpose(0, 1) for part in turned)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> Tensor:
        context = attention_varlen(
            query,
            key,
            value,
            batch.cu_seqlens,
            batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_k=batch.max_seqlen,
            is_causal=self.is_causal,
            alibi_slopes=alibi_slopes(self.num_heads, query.device) if self.alibi else None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return context.flatten(1)

    def forward(
        self, x: Tensor, batch: PackedBatch, kept: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """``kept`` gets the keys and values, for a cache."""
        query, key, value = self.project(x, batch)
        if kept is not None:
            kept.append((key, value))
        return self.attend(query, key, value, batch)


class CrossAttention(nn.Module):
    """Attention of each packed target over its own packed source: (target tokens, embed_dim) to the
    same, up to the output projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.dropout = config.dropout
        self.q_proj = Linear(config.embed_dim, config.embed_dim)
        self.kv_proj = Linear(config.embed_dim, 2 * config.embed_dim)
        self.out_proj = Linear(config.embed_dim, config.embed_dim)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The source's keys and values, (source tokens, heads, head_dim) each."""
        projected = self.kv_proj(memory)
        heads = projected.view(memory.shape[0], 2, self.num_heads, self.head_dim)
        key, value = heads.unbind(1)
        return key, value

    def forward(self, x: Tensor, batch: PackedBatch, memory: Tensor, source: PackedBatch) -> Tensor:
        query = self.q_proj(x)
        context = attention_varlen(
            query.view(x.shape[0], self.num_heads, self.head_dim),
            *self.keys_values(memory),
            batch.cu_seqlens,
            source.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_k=source.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return context.flatten(1)


class Layer(nn.Module):
    """One layer of an encoder, or with ``cross`` of a decoder, whose self-attention is causal
    unless it is an encoder's.

    Called with (normed, summed) of the packed tokens, it returns the same pair for the next layer:
    ``summed`` is the residual stream and ``normed`` what a block reads. In a post-norm stack the
    two are one tensor.
    """

    def __init__(self, config: TransformerConfig, *, is_causal: bool, cross: bool) -> None:
        super().__init__()
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        features, eps = config.embed_dim, config.norm_eps
        self.self_attn = SelfAttention(config, is_causal)
        self.norm1 = LayerNorm(features, eps)
        self.cross_attn = CrossAttention(config) if cross else None
        self.norm2 = LayerNorm(features, eps) if cross else None
        self.feed_forward = FeedForward(
            features, config.hidden_dim, config.activation, dropout=config.dropout
        )
        self.norm3 = LayerNorm(features, eps)

    def forward(
        self,
        normed: Tensor,
        summed: Tensor,
        batch: PackedBatch,
        next_norm: nn.Module | None,
        memory: Tensor | None = None,
        source: PackedBatch | None = None,
        kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``next_norm`` is the norm at the entry of what follows a pre-norm layer; ``kept`` gets
        self-attention's keys and values."""
        attention, cross, feed_forward = self.self_attn, self.cross_attn, self.feed_forward
        # The norm that follows each block: its own, or with pre_norm the next block's.
        norms = [self.norm1, self.norm2, self.norm3] if cross else [self.norm1, self.norm3]
        if self.pre_norm:
            norms = [*norms[1:], next_norm]
        context = attention(normed, batch, kept)
        normed, summed = self._end(context, attention.out_proj, summed, norms[0])
        if cross is not None:
            assert memory is not None and source is not None
            context = cross(normed, batch, memory, source)
            normed, summed = self._end(context, cross.out_proj, summed, norms[1])
        if not plain_part(feed_forward, (FeedForward.forward,)):
            return self._sum(feed_forward(normed), summed, norms[-1])
        hidden = feed_forward.hidden(normed)
        return self._end(hidden, feed_forward.linear2, summed, norms[-1])

    def _end(
        self, x: Tensor, linear: nn.Linear, summed: Tensor, norm: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """A block's last linear layer, dropout, residual sum and the norm after it."""
        assert norm is not None
        if not (plain_part(linear, LINEAR_FORWARDS) and plain_part(norm, NORM_FORWARDS)):
            return self._sum(linear(x), summed, norm)
        p = self.dropout if self.training else 0.0
        if self.pre_norm:
            return project_add_norm(x, linear.weight, linear.bias, summed, norm, p)
        normed = project_norm(x, linear.weight, linear.bias, summed, norm, p)
        return normed, normed

    def _sum(self, y: Tensor, summed: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
        """The same after a layer that had to be called: an adapter, or one with a hook."""
        assert norm is not None
        summed = summed + dropout(y, self.dropout if self.training else 0.0)
        normed = norm(summed)
        return normed, summed if self.pre_norm else normed
