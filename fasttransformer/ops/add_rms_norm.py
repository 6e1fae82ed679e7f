"""Residual addition, dropout and root-mean-square normalization in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import device_type_of, fake, needs_grad, new_seed
from ._function import differentiable
from ._norm import (
    ADD_OPTIONS,
    add_inputs,
    checked_shape,
    default_eps,
    fake_statistic,
    fake_vector_grad,
    fold_rows,
    rows_of,
    shaped,
    vector_of,
)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``summed = residual + dropout(input)`` and ``normed = rms_norm(summed)``, in one pass.

    .. math:: S = R + \operatorname{dropout}(X), \qquad
        N = \frac{S}{\sqrt{\frac{1}{C} \sum_j S_j^2 + \epsilon}} \odot w

    Args:
        input, residual: (\*, \*normalized_shape), of one shape and float dtype, any strides.
        normalized_shape: the trailing dimensions to normalize over.
        weight: ``normalized_shape``, of any float dtype.
        eps: 0 or more; ``None`` is torch's rule, as in :func:`~fasttransformer.rms_norm`.
        dropout_p: as in :func:`~fasttransformer.add_layer_norm`.
        backend: forces one backend for this call.

    Returns:
        (normed, summed), both of ``input``'s shape and dtype. ``summed`` is rounded to it, and the
        mean square is that of the rounded values.

    Raises:
        TypeError: not floating point; ``residual`` of another dtype (except under autocast).
        ValueError: shapes that don't fit, eps negative, dropout_p outside [0, 1), devices differ.

    Source: He et al. 2015 (arXiv:1512.03385); Zhang, Sennrich 2019 (arXiv:1910.07467).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), 2)
    >>> summed
    tensor([[3., 4.]])
    """
    shape = checked_shape("add_rms_norm", input, normalized_shape, eps)
    input, residual = add_inputs("add_rms_norm", input, residual, dropout_p)
    w = vector_of("add_rms_norm", "weight", weight, input, shape)
    if eps is None:
        eps = default_eps(input)
    grad = needs_grad(input, residual, weight)
    options = ADD_OPTIONS[grad, dropout_p > 0.0]
    kernel = choose("add_rms_norm", device_type_of(input), input.dtype, options, (), backend)
    seed = new_seed(input.device) if dropout_p > 0.0 else None
    if kernel.forward is None or 0 in shape:
        return reference.add_rms_norm(
            input, residual, shape, weight, eps, dropout_p=dropout_p, seed=seed
        )
    if grad:
        return _add_rms_norm(input, residual, w, seed, eps, dropout_p, shape, kernel)
    x = rows_of(input, shape)
    normed, summed, _ = kernel.forward(x, rows_of(residual, shape), w, eps, dropout_p, seed)
    return shaped(normed, x, input), shaped(summed, x, input)


class _AddRMSNorm:
    @staticmethod
    def forward(input, residual, weight, seed, eps, dropout_p, shape, kernel):
        x = rows_of(input, shape)
        normed, summed, rstd = kernel.forward(
            x, rows_of(residual, shape), weight, eps, dropout_p, seed
        )
        return shaped(normed, x, input), shaped(summed, x, input), rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weight, seed, _, ctx.dropout_p, ctx.shape, ctx.kernel = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, seed, *output[1:])

    @staticmethod
    def backward(ctx, grad_normed, grad_summed):
        if grad_normed is None and grad_summed is None:
            return (None,) * 8
        weight, seed, summed, rstd = ctx.saved_tensors
        shape, wanted = ctx.shape, ctx.needs_input_grad[2]
        if grad_normed is None:
            grad_normed = torch.zeros_like(summed)
        s = rows_of(summed, shape)
        d_residual, d_input, d_weight = ctx.kernel.backward(
            rows_of(grad_normed, shape),
            None if grad_summed is None else rows_of(grad_summed, shape),
            s, weight, rstd, ctx.dropout_p, seed, wanted,
        )  # fmt: skip
        d_residual = shaped(d_residual, s, summed)
        d_input = d_residual if seed is None else shaped(d_input, s, summed)
        return d_input, d_residual, d_weight if wanted else None, None, None, None, None, None


_add_rms_norm = differentiable(_AddRMSNorm, tensors=4, outputs=2)


@fake("add_rms_norm")
def _(input, residual, weight, eps, dropout_p, seed):
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape),
        fake_statistic(input),
    )


@fake("add_rms_norm_backward")
def _(grad_normed, grad_summed, summed, weight, rstd, dropout_p, seed, weight_grad):
    return (
        summed.new_empty(summed.shape),
        summed.new_empty((0,) if seed is None else summed.shape),
        fake_vector_grad(summed, weight, summed.shape[-1], weight_grad),
    )


fold_rows("add_rms_norm", batched=(0, 1), per_sample=(4,))
fold_rows("add_rms_norm_backward", batched=(0, 1, 2, 4), per_sample=(5, 7))
