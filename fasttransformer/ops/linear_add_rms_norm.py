"""Output projection, residual and RMS norm in one call: the sum is normed while it is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, choose
from ._front import fake, needs_grad
from ._function import differentiable
from ._norm import default_eps, fold_rows, like, narrow_vector
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

    .. math:: S = X W^\top + b + R, \qquad
        N = \frac{S}{\sqrt{\tfrac1C \sum_c S_c^2 + \epsilon}} \odot \gamma

    Arguments are those of :func:`~fasttransformer.linear_add`; ``norm_weight`` is (out_features,)
    of any float dtype. ``eps=None`` is torch's rule, the machine epsilon of the dtype that is
    computed in: float32's for 16-bit inputs.

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
    eps = default_eps(input) if eps is None else eps
    check_norm(op, input, out_shape[-1], eps, norm_weight=norm_weight)
    grad = needs_grad(input, weight, bias, residual, norm_weight)
    kernel = choose(op, input.device.type, input.dtype, _GRAD if grad else _NONE, (), backend)
    if kernel.forward is None:
        return reference.linear_add_rms_norm(input, weight, bias, residual, norm_weight, eps)
    x, weight, rows = rows_of(input, weight, residual, out_shape)
    args = (x, weight, bias, rows, narrow_vector(norm_weight, x), eps)
    normed, summed, _ = _linear_add_rms_norm(*args, kernel) if grad else kernel.forward(*args)
    return normed.view(out_shape), summed.view(out_shape)


class _LinearAddRMSNorm:
    @staticmethod
    def forward(x, weight, bias, residual, norm_weight, eps, kernel):
        return kernel.forward(x, weight, bias, residual, norm_weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, norm_weight, _, ctx.kernel = inputs
        _, summed, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, summed, norm_weight, rstd)

    @staticmethod
    def backward(ctx, grad_normed, grad_summed, _rstd):
        x, weight, summed, norm_weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_norm_weight = None
        if grad_normed is None:
            d_summed = grad_summed
        else:
            norm = TABLE["add_rms_norm"][ctx.kernel.backend].backward
            d_summed, _, d_norm_weight = norm(
                grad_normed.contiguous(),
                None if grad_summed is None else grad_summed.contiguous(),
                summed, norm_weight, rstd, 0.0, None, needs[4],
            )  # fmt: skip
            d_norm_weight = like(d_norm_weight, norm_weight, needs[4])
        if d_summed is None:
            return (None,) * 7
        linear = TABLE["linear_add"][ctx.kernel.backend]
        d_input, d_weight, d_bias = linear_gradients(linear, d_summed, x, weight, needs)
        d_residual = d_summed if needs[3] else None
        return d_input, d_weight, d_bias, d_residual, d_norm_weight, None, None


_linear_add_rms_norm = differentiable(_LinearAddRMSNorm)


@fake("linear_add_rms_norm")
def _(input, weight, bias, residual, norm_weight, eps):
    rows, features = row_count(input), weight.shape[0]
    return (
        input.new_empty((rows, features)),
        input.new_empty((rows, features)),
        input.new_empty((rows,), dtype=torch.float32),
    )


fold_rows("linear_add_rms_norm", batched=(0, 3), per_sample=())
