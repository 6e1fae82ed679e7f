"""Output projection, residual and RMS norm in one call: the sum is normed while it is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, Kernel, choose
from ._front import fake, needs_grad
from .linear_add import autocast_linear, check_linear, linear_gradients, row_count, rows_of
from .linear_add_layer_norm import check_norm

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


def linear_add_rms_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``summed = input @ weight.T + bias + residual`` and ``normed = rms_norm(summed)``.

    .. math:: S = X W^\top + b + R, \qquad N = \frac{S}{\sqrt{\tfrac1C \sum_c S_c^2 + \epsilon}} \odot \gamma

    Arguments are those of :func:`~fasttransformer.linear_add`; ``eps=None`` is the machine epsilon
    of ``input``'s dtype, as in :func:`torch.nn.functional.rms_norm`.

    Returns:
        (normed, summed), both (\*, out_features) in ``input``'s dtype.

    Raises:
        TypeError: not floating point, or dtypes of the linear part differ.
        ValueError: shapes that don't fit, eps negative.

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.linear_add_rms_norm(torch.ones(1, 2), torch.eye(2), None,
    ...                                         torch.tensor([[2.0, 2.0]]))
    >>> summed, normed
    (tensor([[3., 3.]]), tensor([[1., 1.]]))
    """
    op = "linear_add_rms_norm"
    input, weight, bias, residual = autocast_linear(input, weight, bias, residual)
    out_shape = check_linear(op, input, weight, bias, residual)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    check_norm(op, input, out_shape[-1], eps, norm_weight=norm_weight)
    grad = needs_grad(input, weight, bias, residual, norm_weight)
    kernel = choose(op, input.device.type, input.dtype, _GRAD if grad else _NONE, (), backend)
    if kernel.forward is None:
        return reference.linear_add_rms_norm(input, weight, bias, residual, norm_weight, eps)
    x, weight, rows = rows_of(input, weight, residual, out_shape)
    args = (x, weight, bias, rows, norm_weight, eps)
    if grad:
        normed, summed = _LinearAddRMSNorm.apply(*args, kernel)
    else:
        normed, summed, _ = kernel.forward(*args)
    return normed.view(out_shape), summed.view(out_shape)


class _LinearAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm_weight, eps, kernel: Kernel):
        normed, summed, rstd = kernel.forward(x, weight, bias, residual, norm_weight, eps)
        ctx.save_for_backward(x, weight, summed, norm_weight, rstd)
        ctx.backend = kernel.backend
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_normed, grad_summed):
        x, weight, summed, norm_weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_norm_weight = None
        if grad_normed is None:
            d_summed = grad_summed
        else:
            norm = TABLE["add_rms_norm"][ctx.backend].backward
            d_summed, _, d_norm_weight = norm(
                grad_normed.contiguous(),
                None if grad_summed is None else grad_summed.contiguous(),
                summed, norm_weight, rstd, 0.0, None, needs[4],
            )  # fmt: skip
        if d_summed is None:
            return (None,) * 7
        linear = TABLE["linear_add"][ctx.backend]
        d_input, d_weight, d_bias = linear_gradients(linear, d_summed, x, weight, needs)
        return (
            d_input,
            d_weight,
            d_bias,
            d_summed if needs[3] else None,
            d_norm_weight if needs[4] else None,
            None,
            None,
        )


@fake("linear_add_rms_norm")
def _(input, weight, bias, residual, norm_weight, eps):
    rows, features = row_count(input), weight.shape[0]
    return (
        input.new_empty((rows, features)),
        input.new_empty((rows, features)),
        input.new_empty((rows,), dtype=torch.float32),
    )
