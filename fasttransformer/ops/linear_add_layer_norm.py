"""Output projection, residual and layer norm in one call: the sum is normed while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import TABLE, choose
from ._front import fake, is_float, needs_grad, positive_eps, same_device
from ._function import differentiable
from ._norm import fold_rows, like, narrow_vector
from .linear_add import (
    autocast_linear,
    check_linear,
    linear_gradients,
    row_count,
    rows_of,
)

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``summed = input @ weight.T + bias + residual`` and ``normed = layer_norm(summed)``.

    .. math:: S = X W^\top + b + R, \qquad
        N = \frac{S - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot \gamma + \beta

    with mean and variance over the last dimension. Arguments are those of
    :func:`~fasttransformer.linear_add`; ``norm_weight`` and ``norm_bias`` are (out_features,) of
    any float dtype.

    Returns:
        (normed, summed), both (\*, out_features) in ``input``'s dtype; the statistics are those of
        ``summed`` as it is returned.

    Raises:
        TypeError: not floating point, or dtypes of the linear part differ.
        ValueError: shapes that don't fit, eps negative.

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
    check_norm(op, input, out_shape[-1], eps, norm_weight=norm_weight, norm_bias=norm_bias)
    grad = needs_grad(input, weight, bias, residual, norm_weight, norm_bias)
    kernel = choose(op, input.device.type, input.dtype, _GRAD if grad else _NONE, (), backend)
    if kernel.forward is None:
        return reference.linear_add_layer_norm(
            input, weight, bias, residual, norm_weight, norm_bias, eps
        )
    x, weight, rows = rows_of(input, weight, residual, out_shape)
    norm_weight, norm_bias = narrow_vector(norm_weight, x), narrow_vector(norm_bias, x)
    args = (x, weight, bias, rows, norm_weight, norm_bias, eps)
    normed, summed, _, _ = _linear_add_layer_norm(*args, kernel) if grad else kernel.forward(*args)
    return normed.view(out_shape), summed.view(out_shape)


def check_norm(op: str, input: Tensor, features: int, eps: float, **vectors: Tensor | None) -> None:
    is_float(op, **vectors)
    same_device(op, input, **vectors)
    positive_eps(op, eps)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (features,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(vector.shape)}; weight's out_features "
                f"make it ({features},)"
            )


class _LinearAddLayerNorm:
    # Backward joins two operators that exist anyway: the norm's with the residual's gradient
    # (add_layer_norm's), then the linear layer's.
    @staticmethod
    def forward(x, weight, bias, residual, norm_weight, norm_bias, eps, kernel):
        return kernel.forward(x, weight, bias, residual, norm_weight, norm_bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, norm_weight, norm_bias, _, ctx.kernel = inputs
        _, summed, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, summed, norm_weight, norm_bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad_normed, grad_summed, _mean, _rstd):
        x, weight, summed, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_norm_weight = d_norm_bias = None
        if grad_normed is None:
            d_summed = grad_summed
        else:
            norm = TABLE["add_layer_norm"][ctx.kernel.backend].backward
            d_summed, _, d_norm_weight, d_norm_bias = norm(
                grad_normed.contiguous(),
                None if grad_summed is None else grad_summed.contiguous(),
                summed,
                norm_weight,
                mean,
                rstd,
                0.0,
                None,
                needs[4],
                needs[5],
            )
            d_norm_weight = like(d_norm_weight, norm_weight, needs[4])
            d_norm_bias = like(d_norm_bias, norm_bias, needs[5])
        if d_summed is None:
            return (None,) * 8
        linear = TABLE["linear_add"][ctx.kernel.backend]
        d_input, d_weight, d_bias = linear_gradients(linear, d_summed, x, weight, needs)
        d_residual = d_summed if needs[3] else None
        return d_input, d_weight, d_bias, d_residual, d_norm_weight, d_norm_bias, None, None


_linear_add_layer_norm = differentiable(_LinearAddLayerNorm)


@fake("linear_add_layer_norm")
def _(input, weight, bias, residual, norm_weight, norm_bias, eps):
    rows, features = row_count(input), weight.shape[0]
    return (
        input.new_empty((rows, features)),
        input.new_empty((rows, features)),
        input.new_empty((rows,), dtype=torch.float32),
        input.new_empty((rows,), dtype=torch.float32),
    )


fold_rows("linear_add_layer_norm", batched=(0, 3), per_sample=())
