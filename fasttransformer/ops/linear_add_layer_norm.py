"""Output projection, residual and layer norm in one call: the sum is normed while in cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, choose
from ._front import device_type_of, fake, needs_grad, positive_eps
from ._function import differentiable
from ._norm import add_options, fake_statistic, fold_rows, vector_of, wide_bias
from .linear_add import (
    autocast_linear,
    check_linear,
    drawn_dropout,
    fake_output,
    kernel_inputs,
    linear_gradients,
    masked,
    operands_to_keep,
    viewed,
)


def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    return_sum: bool = True,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Any:
    r"""``summed = dropout(input @ weight.T + bias) + residual``, ``normed = layer_norm(summed)``.

    .. math:: S = \operatorname{dropout}(X W^\top + b) + R, \qquad
        N = \frac{S - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot \gamma + \beta

    with mean and variance over the last dimension. Arguments are those of
    :func:`~fasttransformer.linear_add`; ``norm_weight`` and ``norm_bias`` are (out_features,) of
    any float dtype.

    Args:
        return_sum: False returns normed alone; without gradients the sum is then never written.
        dropout_p: as in :func:`~fasttransformer.linear_add`.

    Returns:
        (normed, summed), both (\*, out_features) in ``input``'s dtype; the statistics are those of
        ``summed`` as it is returned.

    Raises:
        TypeError: not floating point, or dtypes of the linear part differ.
        ValueError: shapes that don't fit, eps negative, dropout_p outside [0, 1).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.linear_add_layer_norm(torch.ones(1, 2), torch.eye(2), None,
    ...                                           torch.tensor([[1.0, 3.0]]))
    >>> summed
    tensor([[2., 4.]])
    >>> normed.round()
    tensor([[-1.,  1.]])
    """
    op = "linear_add_layer_norm"
    input, weight, bias, residual = autocast_linear(input, weight, bias, residual)
    out_shape = check_linear(op, input, weight, bias, residual)
    w = norm_vector(op, "norm_weight", norm_weight, input, out_shape[-1])
    b = norm_vector(op, "norm_bias", norm_bias, input, out_shape[-1])
    positive_eps(op, eps)
    grad = needs_grad(input, weight, bias, residual, norm_weight, norm_bias)
    options = add_options(op, grad, dropout_p)
    kernel = choose(op, device_type_of(input), input.dtype, options, (), backend)
    dropout = drawn_dropout(dropout_p, input)
    if kernel.forward is None:
        return reference.linear_add_layer_norm(
            input, weight, bias, residual, norm_weight, norm_bias, eps, *dropout,
            return_sum=return_sum,
        )  # fmt: skip
    x, weight, bias, rows = kernel_inputs(input, weight, bias, residual, out_shape)
    if grad:
        normed, summed = _linear_add_layer_norm(
            x, weight, bias, rows, w, b, *(dropout[::-1] or (None, 0.0)), eps, kernel
        )
    else:
        normed, summed, _, _ = kernel.forward(
            x, weight, bias, rows, w, b, eps, return_sum, *dropout
        )
    normed = viewed(normed, out_shape)
    return (normed, viewed(summed, out_shape)) if return_sum else normed


def norm_vector(
    op: str, name: str, vector: Tensor | None, input: Tensor, features: int
) -> Tensor | None:
    return vector_of(op, name, vector, input, (features,), "weight's out_features make it")


class _LinearAddLayerNorm:
    # Backward joins two operators that exist anyway: the norm's with the residual's gradient
    # (add_layer_norm's), then the linear layer's.
    @staticmethod
    def forward(x, weight, bias, residual, norm_weight, norm_bias, seed, dropout_p, eps, kernel):
        return kernel.forward(
            x, weight, bias, residual, norm_weight, norm_bias, eps, True, dropout_p, seed
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, norm_weight, norm_bias, seed, ctx.dropout_p, _, ctx.kernel = inputs
        ctx.wide_bias = wide_bias(norm_weight, norm_bias)
        ctx.set_materialize_grads(False)
        kept = operands_to_keep(x, weight, ctx.needs_input_grad)
        ctx.shapes = x.shape, weight.shape
        ctx.save_for_backward(*kept, norm_weight, seed, *output[1:])

    @staticmethod
    def backward(ctx, grad_normed, grad_summed):
        x, weight, norm_weight, seed, summed, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_norm_weight = d_norm_bias = None
        linear = TABLE["linear_add"][ctx.kernel.backend]
        if grad_normed is None and grad_summed is None:
            return (None,) * 10
        if grad_normed is None:
            d_summed = grad_summed
            d_inner = masked(grad_summed, ctx.dropout_p, seed, linear)
        else:
            norm = TABLE["add_layer_norm"][ctx.kernel.backend].backward
            d_summed, d_inner, d_norm_weight, d_norm_bias = norm(
                grad_normed.contiguous(),
                None if grad_summed is None else grad_summed.contiguous(),
                summed, norm_weight, mean, rstd, ctx.dropout_p, seed, needs[4], needs[5],
                *ctx.wide_bias,
            )  # fmt: skip
            d_inner = d_summed if seed is None else d_inner
            d_norm_weight = d_norm_weight if needs[4] else None
            d_norm_bias = d_norm_bias if needs[5] else None
        d_input, d_weight, d_bias = linear_gradients(linear, d_inner, x, weight, needs, ctx.shapes)
        d_residual = d_summed if needs[3] else None
        return d_input, d_weight, d_bias, d_residual, d_norm_weight, d_norm_bias, *(None,) * 4


_linear_add_layer_norm = differentiable(_LinearAddLayerNorm, tensors=7, outputs=2)


@fake("linear_add_layer_norm")
def _(
    input, weight, bias, residual, norm_weight, norm_bias, eps, return_sum, dropout_p=0.0, seed=None
):  # fmt: skip
    normed = fake_output(input, weight)
    return (
        normed,
        torch.empty_like(normed) if return_sum else normed.new_empty(0),
        fake_statistic(normed),
        fake_statistic(normed),
    )


fold_rows("linear_add_layer_norm", batched=(0, 3), per_sample=(8,))
