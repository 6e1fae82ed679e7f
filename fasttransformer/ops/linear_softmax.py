"""Output layer: a linear layer and softmax with a temperature."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import needs_grad
from ._output_layer import check_output_layer, check_temperature
from .linear_add import autocast_linear

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


def linear_softmax(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Probabilities of the classes of an output layer.

    .. math:: P = \text{softmax}\left(\frac{X W^\top + b}{\tau}\right)

    Args:
        input: (\*, in_features).
        weight: (classes, in_features), as in :class:`torch.nn.Linear`.
        bias: (classes,).
        temperature: τ > 0; below 1 sharpens, above 1 flattens.
        backend: forces one backend for this call.

    Returns:
        (\*, classes) in ``input``'s dtype; logits and sums are float32 for 16-bit types. Under
        autocast the inputs are cast to its dtype, as for :func:`torch.nn.functional.linear`.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes that don't fit, a temperature that is not positive.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.4.

    >>> import torch, fasttransformer as ft
    >>> ft.linear_softmax(torch.ones(1, 1), torch.tensor([[1.0], [1.0]]))
    tensor([[0.5000, 0.5000]])
    """
    op = "linear_softmax"
    input, weight, bias = autocast_linear(input, weight, bias)
    check_output_layer(op, input, weight, bias)
    check_temperature(op, temperature)
    options = _GRAD if needs_grad(input, weight, bias) else _NONE
    choose(op, input.device.type, input.dtype, options, (), backend)
    return reference.linear_softmax(input, weight, bias, temperature=temperature)
