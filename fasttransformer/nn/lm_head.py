"""The output end of a language model: linear layer and softmax, without storing the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_add import linear_add
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.linear_topk import linear_topk


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
        :func:`fasttransformer.linear_cross_entropy`."""
        return linear_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def topk(self, input: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The ``k`` largest probabilities and their ids, (..., k) each; see
        :func:`fasttransformer.linear_topk`."""
        return linear_topk(input, self.weight, self.bias, k=k, temperature=temperature)
