"""Output projection, residual and RMS norm in one call: the sum is normed while it is in cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, choose
from ._front import device_type_of, fake, needs_grad, positive_eps
from ._function import differentiable
from ._norm import add_options, default_eps, fake_statistic, fold_rows
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
from .linear_add_layer_norm import norm_vector


def linear_add_rms_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    *,
    return_sum: bool = True,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Any:
    r"""``summed = dropout(input @ weight.T + bias) + residual`` and ``normed = rms_norm(summed)``.

    .. math:: S = \operatorname{dropout}(X W^\top + b) + R, \qquad
        N = \frac{S}{\sqrt{\tfrac1C \sum_c S_c^2 + \epsilon}} \odot \gamma

    Arguments are those of :func:`~fasttransformer.linear_add`; ``norm_weight`` is (out_features,)
    of any float dtype. ``eps=None`` is torch's rule, the machine epsilon of the dtype that is
    computed in: float32's for 16-bit inputs.

    Args:
        return_sum: False returns normed alone; without gradients the sum is then never written.
        dropout_p: as in :func:`~fasttransformer.linear_add`.

    Returns:
        (normed, summed), both (\*, out_features) in ``input``'s dtype.

    Raises:
        TypeError: not floating point, or dtypes of the linear part differ.
        ValueError: shapes that don't fit, eps negative, dropout_p outside [0, 1).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.linear_add_rms_norm(torch.ones(1, 2), torch.eye(2), None,
    ...                                         torch.tensor([[2.0, 2.0]]))
    >>> summed, normed
    (tensor([[3., 3.]]), tensor([[1., 1.]]))
    """
    op = "linear_add_rms_norm"
    input, weight, bias, residual = autocast_linear(input, weight, bias, residual)
    out_shape = check_linear(op, input, weight, bias, residual)
    w = norm_vector(op, "norm_weight", norm_weight, input, out_shape[-1])
    eps = default_eps(input) if eps is None else eps
    positive_eps(op, eps)
    grad = needs_grad(input, weight, bias, residual, norm_weight)
    options = add_options(op, grad, dropout_p)
    kernel = choose(op, device_type_of(input), input.dtype, options, (), backend)
    dropout = drawn_dropout(dropout_p, input)
    if kernel.forward is None:
        return reference.linear_add_rms_norm(
            input, weight, bias, residual, norm_weight, eps, *dropout, return_sum=return_sum
        )
    x, weight, bias, rows = kernel_inputs(input, weight, bias, residual, out_shape)
    if grad:
        normed, summed = _linear_add_rms_norm(
            x, weight, bias, rows, w, *(dropout[::-1] or (None, 0.0)), eps, kernel
        )
    else:
        normed, summed, _ = kernel.forward(x, weight, bias, rows, w, eps, return_sum, *dropout)
    normed = viewed(normed, out_shape)
    return (normed, viewed(summed, out_shape)) if return_sum else normed


class _LinearAddRMSNorm:
    @staticmethod
    def forward(x, weight, bias, residual, norm_weight, seed, dropout_p, eps, kernel):
        return kernel.forward(x, weight, bias, residual, norm_weight, eps, True, dropout_p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, norm_weight, seed, ctx.dropout_p, _, ctx.kernel = inputs
        ctx.set_materialize_grads(False)
        kept = operands_to_keep(x, weight, ctx.needs_input_grad)
        ctx.shapes = x.shape, weight.shape
        ctx.save_for_backward(*kept, norm_weight, seed, *output[1:])

    @staticmethod
    def backward(ctx, grad_normed, grad_summed):
        x, weight, norm_weight, seed, summed, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_norm_weight = None
        linear = TABLE["linear_add"][ctx.kernel.backend]
        if grad_normed is None and grad_summed is None:
            return (None,) * 9
        if grad_normed is None:
            d_summed = grad_summed
            d_inner = masked(grad_summed, ctx.dropout_p, seed, linear)
        else:
            norm = TABLE["add_rms_norm"][ctx.kernel.backend].backward
            d_summed, d_inner, d_norm_weight = norm(
                grad_normed.contiguous(),
                None if grad_summed is None else grad_summed.contiguous(),
                summed, norm_weight, rstd, ctx.dropout_p, seed, needs[4],
            )  # fmt: skip
            d_inner = d_summed if seed is None else d_inner
            d_norm_weight = d_norm_weight if needs[4] else None
        d_input, d_weight, d_bias = linear_gradients(linear, d_inner, x, weight, needs, ctx.shapes)
        d_residual = d_summed if needs[3] else None
        return d_input, d_weight, d_bias, d_residual, d_norm_weight, *(None,) * 4


_linear_add_rms_norm = differentiable(_LinearAddRMSNorm, tensors=6, outputs=2)


@fake("linear_add_rms_norm")
def _(input, weight, bias, residual, norm_weight, eps, return_sum, dropout_p=0.0, seed=None):
    normed = fake_output(input, weight)
    return (
        normed,
        torch.empty_like(normed) if return_sum else normed.new_empty(0),
        fake_statistic(normed),
    )


fold_rows("linear_add_rms_norm", batched=(0, 3), per_sample=(7,))
