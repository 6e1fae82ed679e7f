"""Output layer: a linear layer and softmax with a temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, choose
from ._front import GRAD_OPTIONS, fake, needs_grad
from ._function import differentiable, fold, vmap_rule
from ._output_layer import check_output_layer, check_temperature, kernel_operands
from .linear_add import autocast_linear, linear_gradients, operands_to_keep


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
    grad = needs_grad(input, weight, bias)
    kernel = choose(op, input.device.type, input.dtype, GRAD_OPTIONS[grad], (), backend)
    if kernel.forward is None:
        return reference.linear_softmax(input, weight, bias, temperature=temperature)
    operands = kernel_operands(input, weight, bias)
    if grad:
        out = _linear_softmax(*operands, float(temperature), kernel)
    else:
        out = kernel.forward(*operands, float(temperature))
    return out.view(*input.shape[:-1], weight.shape[0])


class _LinearSoftmax:
    # Backward joins two operators that exist anyway: the softmax's, then the linear layer's. For 16
    # bits the probabilities are made again in float32: of a rounded one that is nearly 1, the
    # gradient would have nothing right.
    @staticmethod
    def forward(x, weight, bias, temperature, kernel):
        return kernel.forward(x, weight, bias, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.temperature, ctx.kernel = inputs
        ctx.shapes, ctx.dtype = (x.shape, weight.shape), x.dtype
        if x.dtype == torch.float32:
            kept = operands_to_keep(x, weight, ctx.needs_input_grad)
            ctx.save_for_backward(*kept, None, output)
        else:
            ctx.save_for_backward(x, weight, bias, None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, output = ctx.saved_tensors
        dtype, backend = ctx.dtype, ctx.kernel.backend
        if output is None:
            x, weight, grad = x.float(), weight.float(), grad.float()
            bias = None if bias is None else bias.float()
            output = ctx.kernel.forward(x, weight, bias, ctx.temperature)
        d_logits = TABLE["softmax"][backend].backward(
            grad.contiguous(), output, 1.0 / ctx.temperature, False
        )
        linear = TABLE["linear_add"][backend]
        gradients = linear_gradients(linear, d_logits, x, weight, ctx.needs_input_grad, ctx.shapes)
        return *(None if g is None else g.to(dtype) for g in gradients), None, None


_linear_softmax = differentiable(_LinearSoftmax, tensors=3)


@fake("linear_softmax")
def _(input, weight, bias, temperature):
    return input.new_empty((input.shape[0], weight.shape[0]))


@vmap_rule("linear_softmax")
def _(operator, batch_size, in_dims, input, weight, bias, temperature):
    if in_dims[1] is not None or in_dims[2] is not None:
        return None
    out = operator(fold(input, in_dims[0], batch_size), weight, bias, temperature)
    return out.view(batch_size, -1, out.shape[1]), 0
