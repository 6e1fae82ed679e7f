"""The output end of a language model: linear layer and softmax, without storing the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy
from ..ops.linear_add import linear_add
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.linear_topk import linear_topk
from ..ops.softmax import softmax
from ._plain import plain_part
from .linear import LINEAR_FORWARDS


class LMHead(nn.Linear):
    r"""Output layer :math:`p = \text{softmax}(x W^\top + b)` over the vocabulary.

    Called, it gives the logits (..., out_features); :meth:`loss` and :meth:`topk` do without them,
    so memory does not grow with tokens × vocabulary. Input (..., in_features), float; the logits
    have its dtype.

    Args:
        in_features, out_features, bias: as for :class:`torch.nn.Linear`; no bias by default.

    ``head.weight = embedding.weight`` ties the two: one parameter with one gradient.

    Raises:
        TypeError: dtypes that differ outside autocast.
        ValueError: shapes that don't fit; a target outside the vocabulary.

    Source: Press and Wolf, Using the Output Embedding to Improve Language Models, 2017
    (arXiv:1608.05859); the loss: Wijmans et al., 2024 (arXiv:2411.09009).

    >>> import torch, fasttransformer as ft
    >>> head = ft.nn.LMHead(8, 100)
    >>> hidden, target = torch.randn(5, 8), torch.randint(100, (5,))
    >>> loss = torch.nn.functional.cross_entropy(head(hidden), target)
    >>> torch.allclose(head.loss(hidden, target), loss, atol=1e-5)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The logits, (..., out_features)."""
        return linear_add(input, self.weight, self.bias)

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross entropy of (tokens, in_features) against (tokens,) ids; see
        :func:`fasttransformer.linear_cross_entropy`.

        Raises:
            ValueError: ``input`` of more dimensions: flatten it, ``head.loss(input.flatten(0, -2),
                target.flatten())``.
        """
        if input.dim() > 2:
            raise ValueError(
                f"LMHead.loss: input has shape {tuple(input.shape)}; it must be (tokens, "
                f"{self.in_features}): head.loss(input.flatten(0, -2), target.flatten())"
            )
        return head_loss(
            self,
            input,
            target,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def topk(self, input: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The ``k`` largest probabilities and their ids, (..., k) each; see
        :func:`fasttransformer.linear_topk`."""
        if plain_part(self, HEADS):
            return linear_topk(input, self.weight, self.bias, k=k, temperature=temperature)
        return topk_of(self(input), k, temperature)


#: The forwards of an output layer whose weight may be read instead of calling it.
HEADS = (*LINEAR_FORWARDS, LMHead.forward)


def head_loss(head: nn.Module, input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Cross entropy of an output layer of any kind: from its weight, without the logits, unless
    there is more to it (an adapter, a hook), and then from the logits that it is called for."""
    if plain_part(head, HEADS):
        weight: Any = head.weight
        bias: Any = head.bias
        return linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
    return cross_entropy(_wide(head(input)), target, **options)


def topk_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The ``k`` largest probabilities and their ids, of equal ones the first."""
    probabilities = softmax(_wide(logits), -1, scale=1.0 / temperature)
    values, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].to(logits.dtype), indices[..., :k]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
