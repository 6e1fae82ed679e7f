"""Residual addition, dropout and layer normalization in one pass over memory."""

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
    fake_statistic,
    fake_vector_grad,
    fold_rows,
    rows_of,
    shaped,
    vector_of,
    wide_bias,
)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``summed = residual + dropout(input)`` and ``normed = layer_norm(summed)``, in one pass.

    .. math:: S = R + \operatorname{dropout}(X), \qquad
        N = \frac{S - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b

    A post-norm layer goes on with ``normed``; a pre-norm layer feeds ``normed`` to the next block
    and carries ``summed`` on as its residual.

    Args:
        input, residual: (\*, \*normalized_shape), of one shape and float dtype, any strides.
        normalized_shape: the trailing dimensions to normalize over.
        weight, bias: ``normalized_shape``, of any float dtype.
        eps: added to the variance; 0 or more.
        dropout_p: probability with which an element of ``input`` is dropped, in [0, 1); always
            applied, as by a functional dropout with ``training=True``. The mask is a function of a
            seed drawn from torch's generator and the position, equal on every backend.
        backend: forces one backend for this call.

    Returns:
        (normed, summed), both of ``input``'s shape and dtype. ``summed`` is rounded to it, and the
        statistics are those of the rounded values.

    Raises:
        TypeError: not floating point; ``residual`` of another dtype (except under autocast).
        ValueError: shapes that don't fit, eps negative, dropout_p outside [0, 1), devices differ.

    Source: He et al. 2015 (arXiv:1512.03385); Ba, Kiros, Hinton 2016 (arXiv:1607.06450).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.add_layer_norm(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]]),
    ...                                    (2,), eps=0.0)
    >>> normed, summed
    (tensor([[-1.,  1.]]), tensor([[1., 3.]]))
    """
    shape = checked_shape("add_layer_norm", input, normalized_shape, eps)
    input, residual = add_inputs("add_layer_norm", input, residual, dropout_p)
    w = vector_of("add_layer_norm", "weight", weight, input, shape)
    b = vector_of("add_layer_norm", "bias", bias, input, shape)
    grad = needs_grad(input, residual, weight, bias)
    options = ADD_OPTIONS[grad, dropout_p > 0.0]
    kernel = choose("add_layer_norm", device_type_of(input), input.dtype, options, (), backend)
    seed = new_seed(input.device) if dropout_p > 0.0 else None
    if kernel.forward is None or 0 in shape:
        return reference.add_layer_norm(
            input, residual, shape, weight, bias, eps, dropout_p=dropout_p, seed=seed
        )
    if grad:
        return _add_layer_norm(input, residual, w, b, seed, eps, dropout_p, shape, kernel)
    x = rows_of(input, shape)
    normed, summed, _, _ = kernel.forward(x, rows_of(residual, shape), w, b, eps, dropout_p, seed)
    return shaped(normed, x, input), shaped(summed, x, input)


class _AddLayerNorm:
    @staticmethod
    def forward(input, residual, weight, bias, seed, eps, dropout_p, shape, kernel):
        x = rows_of(input, shape)
        normed, summed, mean, rstd = kernel.forward(
            x, rows_of(residual, shape), weight, bias, eps, dropout_p,
            seed,
        )  # fmt: skip
        return shaped(normed, x, input), shaped(summed, x, input), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weight, bias, seed, _, ctx.dropout_p, ctx.shape, ctx.kernel = inputs
        ctx.wide_bias = wide_bias(weight, bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, seed, *output[1:])

    @staticmethod
    def backward(ctx, grad_normed, grad_summed):
        if grad_normed is None and grad_summed is None:
            return (None,) * 9
        weight, seed, summed, mean, rstd = ctx.saved_tensors
        shape, needs = ctx.shape, ctx.needs_input_grad
        if grad_normed is None:
            grad_normed = torch.zeros_like(summed)
        s = rows_of(summed, shape)
        d_residual, d_input, d_weight, d_bias = ctx.kernel.backward(
            rows_of(grad_normed, shape),
            None if grad_summed is None else rows_of(grad_summed, shape),
            s, weight, mean, rstd, ctx.dropout_p, seed, needs[2], needs[3],
            *ctx.wide_bias,
        )  # fmt: skip
        d_residual = shaped(d_residual, s, summed)
        d_input = d_residual if seed is None else shaped(d_input, s, summed)
        return (
            d_input, d_residual, d_weight if needs[2] else None, d_bias if needs[3] else None, None,
            None, None, None, None,
        )  # fmt: skip


_add_layer_norm = differentiable(_AddLayerNorm, tensors=5, outputs=2)


@fake("add_layer_norm")
def _(input, residual, weight, bias, eps, dropout_p, seed):
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape),
        fake_statistic(input),
        fake_statistic(input),
    )


@fake("add_layer_norm_backward")
def _(
    grad_normed, grad_summed, summed, weight, mean, rstd, dropout_p, seed, weight_grad, bias_grad,
    wide_bias=False,
):  # fmt: skip
    features = summed.shape[-1]
    return (
        summed.new_empty(summed.shape),
        summed.new_empty((0,) if seed is None else summed.shape),
        fake_vector_grad(summed, weight, features, weight_grad),
        fake_vector_grad(summed, weight, features, bias_grad, wide_bias),
    )


fold_rows("add_layer_norm", batched=(0, 1), per_sample=(5,))
fold_rows("add_layer_norm_backward", batched=(0, 1, 2, 4, 5), per_sample=(6, 8, 9))
