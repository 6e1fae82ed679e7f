"""The input end of a Transformer: tokens with positions, rotary positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._activation import dropout
from ..ops._derivatives import lasting, transforms_active
from ..ops._front import recorded_as_graph
from ..ops.embedding import embedding
from ..ops.rotary_embedding import rotary_embedding
from ..reference.embedding import sinusoid
from .norms import checked_dropout


class TokenPositionEmbedding(nn.Module):
    r"""Token embedding, scaled, with its position added, in one kernel.

    .. math:: y_n = \text{dropout}(\text{scale} \cdot W_{x_n} + P_{p_n})

    Input ids (\*, length), output (\*, length, embedding_dim) in the table's dtype.

    Args:
        num_embeddings, embedding_dim: size of the table ``weight``.
        positions: ``"sinusoidal"`` (fixed, any length), ``"learned"`` (a second table,
            ``position_weight``), or None.
        max_length: positions of the learned table.
        padding_idx: a token whose look-ups give its row no gradient; its row starts at 0.
        scale: multiplies the tokens' rows; None = :math:`\sqrt{\text{embedding\_dim}}`, the
            Transformer paper's, where rows start with variance 1 / embedding_dim.
        dropout: probability, in [0, 1), of dropping an element in training.

    Raises:
        TypeError: ids that are no integers.
        ValueError: another ``positions``; dropout outside [0, 1); an id or a position outside its
            table, in compiled graphs too.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), sections 3.4, 3.5 and 5.4.

    >>> import torch, fasttransformer as ft
    >>> ft.nn.TokenPositionEmbedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        positions: str | None = "sinusoidal",
        max_length: int = 1024,
        padding_idx: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if positions not in ("sinusoidal", "learned", None):
            raise ValueError(
                f"TokenPositionEmbedding: positions is {positions!r}; it must be 'sinusoidal', "
                "'learned' or None"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.positions, self.padding_idx = positions, padding_idx
        self.scale = math.sqrt(embedding_dim) if scale is None else scale
        self.dropout = checked_dropout("TokenPositionEmbedding", dropout)
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.position_weight = None
        if positions == "learned":
            self.position_weight = nn.Parameter(
                torch.empty(max_length, embedding_dim, device=device, dtype=dtype)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that a scaled row has variance 1; learned positions likewise."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()
        if self.position_weight is not None:
            nn.init.normal_(self.position_weight)

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """Ids, and positions that broadcast to them (0, 1, … unless given), to their vectors."""
        y = embedding(
            input,
            self.weight,
            positions=None if self.positions is None else positions,
            position_weight=self.position_weight,
            sinusoidal=self.positions == "sinusoidal",
            scale=self.scale,
            padding_idx=self.padding_idx,
        )
        return dropout(y, self.dropout) if self.training and self.dropout else y

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, positions={self.positions!r}"


class SinusoidalPositionalEncoding(nn.Module):
    r"""Adds the Transformer paper's fixed positions to vectors; no parameters, any length.

    .. math:: y_{p,2i} = x_{p,2i} + \sin(p / 10000^{2i/C}), \qquad
        y_{p,2i+1} = x_{p,2i+1} + \cos(p / 10000^{2i/C})

    Input (\*, length, embedding_dim), float; output the same, in its dtype. Where the vectors are a
    table's rows, :class:`TokenPositionEmbedding` looks up and adds in one kernel.

    Args:
        embedding_dim: C.
        dropout: probability, in [0, 1), of dropping an element of the sum in training.

    Raises:
        ValueError: an input whose last dimension is not ``embedding_dim``; dropout outside [0, 1).

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.5.

    >>> import torch, fasttransformer as ft
    >>> ft.nn.SinusoidalPositionalEncoding(4)(torch.zeros(1, 2, 4))[0, 0]
    tensor([0., 1., 0., 1.])
    """

    def __init__(self, embedding_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.dropout = checked_dropout("SinusoidalPositionalEncoding", dropout)

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """``positions`` are integers that broadcast to (\\*, length); 0, 1, … unless given."""
        if input.dim() < 2 or input.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"SinusoidalPositionalEncoding: input has shape {tuple(input.shape)}; it must be "
                f"(*, length, {self.embedding_dim})"
            )
        if positions is None:
            positions = torch.arange(input.shape[-2], device=input.device)
        wide = torch.promote_types(input.dtype, torch.float32)
        table = sinusoid(positions, self.embedding_dim)
        y = (input.to(wide) + table.to(wide)).to(input.dtype)
        return dropout(y, self.dropout) if self.training and self.dropout else y

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, dropout={self.dropout}"


class RotaryEmbedding(nn.Module):
    r"""Rotary positions of queries and keys; holds no parameters and nothing in ``state_dict``.

    .. math:: (a, b)_i \mapsto (a \cos\theta - b \sin\theta,\; b \cos\theta + a \sin\theta),
        \qquad \theta = p \cdot \text{base}^{-2i / D}

    Called with query (B, H, L, D) and key (B, G, L, D), and ``position_ids`` (L,) or (B, L) unless
    they are 0, 1, …; gives both turned, in their dtype. The tables are float32 and grow as needed.

    Args:
        head_dim: D, even.
        base: of the angles.
        interleaved: pairs are features (2i, 2i + 1); else (i, i + D / 2).

    Raises:
        ValueError: an odd head_dim; shapes that don't fit.

    Source: Su et al., RoFormer, 2021 (arXiv:2104.09864).

    >>> import torch, fasttransformer as ft
    >>> query, key = ft.nn.RotaryEmbedding(8)(torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8))
    >>> query.shape, torch.equal(query[:, :, 0], torch.ones(1, 2, 8))  # position 0 is not turned
    (torch.Size([1, 2, 3, 8]), True)
    """

    def __init__(self, head_dim: int, base: float = 10000.0, *, interleaved: bool = False) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim is {head_dim}; it must be even")
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved
        # No buffer: a model that is made on the meta device could not fill one later.
        self._cached: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (length or more, head_dim / 2) float32."""
        cached = self._cached
        if cached is None or cached[0].shape[0] < length or cached[0].device != device:
            rows = 1 << max(length - 1, 0).bit_length()
            if torch.compiler.is_compiling():
                return self._turns(torch.arange(rows, device=device))
            with lasting() as kept:
                cached = self._turns(torch.arange(rows, device=device))
                if kept:
                    self._cached = cached
        return cached

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the positions' angles, each (*, head_dim / 2) float32."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        angle = positions.double().unsqueeze(-1) * self.base ** (-exponent / self.head_dim)
        return angle.cos().float(), angle.sin().float()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        position_ids: Tensor | None = None,
        *,
        max_position: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(query, key), turned; ``max_position`` spares the look for the largest position."""
        if position_ids is None:
            length = query.shape[2]
        elif max_position is None and _traced():
            # The largest position is not known while a graph is made, so it computes its own rows.
            cos, sin = self._turns(position_ids)
            return rotary_embedding(query, key, cos, sin, interleaved=self.interleaved)
        elif max_position is None:
            length = int(position_ids.max()) + 1 if position_ids.numel() else 0
        else:
            length = max_position + 1
        cos, sin = self.tables(max(length, 1), query.device)
        return rotary_embedding(
            query, key, cos, sin, interleaved=self.interleaved, position_ids=position_ids
        )

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}"


def _traced() -> bool:
    """Whether a tensor's numbers can't be looked at: torch.compile, export, vmap, jit.trace."""
    return recorded_as_graph() or transforms_active()
