r"""Output layer: a linear layer and softmax with a temperature.

    out = softmax((input @ weight.T + bias) / temperature)

Shapes: input (..., C), weight (V, C), bias (V,), out (..., V) in the input's dtype; the logits are
not rounded. temperature > 0: below 1 sharpens, above 1 flattens.

Sources: Vaswani et al., 2017 (arXiv:1706.03762), section 3.4; temperature: Hinton et al., 2015
(1503.02531).

>>> import torch
>>> linear_softmax(torch.ones(1, 1), torch.tensor([[1.0], [1.0]]))
tensor([[0.5000, 0.5000]])
"""

from torch import Tensor

from fasttransformer.reference.linear_add import linear
from fasttransformer.reference.softmax import softmax


def linear_softmax(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Probabilities of the V classes."""
    return softmax(linear(input, weight, bias) / temperature).to(input.dtype)
