"""The k most probable classes of an output layer; the logits of all rows never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import GRAD_OPTIONS, fake, needs_grad
from ._norm import fold_rows
from ._output_layer import by_rows, check_output_layer, check_temperature, kernel_operands
from .linear_add import autocast_linear


def linear_topk(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The ``k`` largest probabilities of an output layer, and their classes.

    .. math:: P = \text{softmax}\left(\frac{X W^\top + b}{\tau}\right)

    The values are probabilities among all classes: they sum to at most 1, and their logarithms are
    the scores of a beam search.

    Args:
        input: (\*, in_features).
        weight: (classes, in_features), as in :class:`torch.nn.Linear`.
        bias: (classes,).
        k: 0 … classes.
        temperature: τ > 0.
        backend: forces one backend for this call.

    Returns:
        values (\*, k) in ``input``'s dtype, falling from left to right, and indices (\*, k) int64;
        of equal logits the lower index comes first. Under autocast inputs are cast to its dtype.

    Raises:
        TypeError: not floating point, or dtypes differ; ``k`` is no integer.
        ValueError: shapes that don't fit, ``k`` or the temperature out of range.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867), section 4.

    >>> import torch, fasttransformer as ft
    >>> values, indices = ft.linear_topk(torch.ones(1), torch.tensor([[0.0], [2.0], [2.0]]), k=2)
    >>> indices
    tensor([1, 2])
    """
    op = "linear_topk"
    input, weight, bias = autocast_linear(input, weight, bias)
    check_output_layer(op, input, weight, bias)
    check_temperature(op, temperature)
    classes = weight.shape[0]
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k is {k!r}; it must be an integer")
    if not 0 <= k <= classes:
        raise ValueError(f"{op}: k is {k}; it must be in [0, {classes}], the number of classes")
    options = GRAD_OPTIONS[needs_grad(input, weight, bias)]
    kernel = choose(op, input.device.type, input.dtype, options, (), backend)
    if kernel.forward is not None:
        values, indices = kernel.forward(
            *kernel_operands(input, weight, bias), k, float(temperature)
        )
        shape = (*input.shape[:-1], k)
        return values.view(shape), indices.view(shape)

    def top(rows: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_topk(rows, weight, bias, k=k, temperature=temperature)

    if input.dim() <= 2:
        return by_rows(top, classes, input) if input.dim() == 2 else top(input)
    values, indices = by_rows(top, classes, input.flatten(0, -2))
    return values.unflatten(0, input.shape[:-1]), indices.unflatten(0, input.shape[:-1])


@fake("linear_topk")
def _(input, weight, bias, k, temperature):
    shape = (input.shape[0], k)
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int64)


fold_rows("linear_topk", batched=(0,), per_sample=())
