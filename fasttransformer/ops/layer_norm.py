"""Layer normalization, torch's own signature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import fake, needs_grad
from ._function import differentiable
from ._norm import (
    GRAD,
    NO_OPTIONS,
    check_vector,
    checked_shape,
    fake_vector_grad,
    flat,
    fold_rows,
    like,
    narrow_vector,
    on_float32_list,
    rows_of,
    shaped,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Layer normalization over the last dimensions, as :func:`torch.nn.functional.layer_norm`.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b

    with mean and (biased) variance over ``normalized_shape``, in float32 for 16-bit inputs.

    Args:
        input: (\*, \*normalized_shape), float of any strides.
        normalized_shape: the trailing dimensions to normalize over.
        weight, bias: ``normalized_shape``, of any float dtype; the result has ``input``'s dtype
            whatever theirs is (bfloat16 input with float32 weight is usual under autocast).
        eps: added to the variance; 0 or more.
        backend: forces one backend for this call.

    With one feature the output is the bias exactly, and the gradients of input and weight are 0.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that don't fit, eps negative, tensors on different devices.

    Source: Ba, Kiros, Hinton, Layer Normalization, 2016 (arXiv:1607.06450).

    >>> import torch, fasttransformer as ft
    >>> ft.layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.]])
    """
    shape = checked_shape("layer_norm", input, normalized_shape, eps)
    if weight is not None:
        check_vector("layer_norm", "weight", weight, input, shape)
    if bias is not None:
        check_vector("layer_norm", "bias", bias, input, shape)
    device_type = input.device.type
    if on_float32_list(device_type) and input.dtype != torch.float64:
        input = input.float()
    grad = needs_grad(input, weight, bias)
    options = GRAD if grad else NO_OPTIONS
    kernel = choose("layer_norm", device_type, input.dtype, options, (), backend)
    features = shape[0] if len(shape) == 1 else math.prod(shape)
    if kernel.forward is None or features == 0:
        return reference.layer_norm(input, shape, weight, bias, eps)
    weight, bias = narrow_vector(weight, input), narrow_vector(bias, input)
    if grad:
        return _layer_norm(input, weight, bias, eps, features, kernel)
    out = kernel.forward(rows_of(input, features), flat(weight), flat(bias), eps)[0]
    return shaped(out, input)


class _LayerNorm:
    @staticmethod
    def forward(input, weight, bias, eps, features, kernel):
        out, mean, rstd = kernel.forward(rows_of(input, features), flat(weight), flat(bias), eps)
        return shaped(out, input), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, _, ctx.features, ctx.kernel = inputs
        _, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 6
        input, weight, bias, mean, rstd = ctx.saved_tensors
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_input, d_weight, d_bias = ctx.kernel.backward(
            rows_of(grad, ctx.features), rows_of(input, ctx.features), flat(weight), mean, rstd,
            wants_weight, wants_bias,
        )  # fmt: skip
        d_weight, d_bias = like(d_weight, weight, wants_weight), like(d_bias, bias, wants_bias)
        return shaped(d_input, input), d_weight, d_bias, None, None, None


_layer_norm = differentiable(_LayerNorm, outputs=1)


@fake("layer_norm")
def _(input, weight, bias, eps):
    statistic = input.new_empty(input.shape[:1], dtype=torch.float32)
    return input.new_empty(input.shape), statistic, torch.empty_like(statistic)


@fake("layer_norm_backward")
def _(grad, input, weight, mean, rstd, weight_grad, bias_grad):
    features = input.shape[1]
    return (
        input.new_empty(input.shape),
        fake_vector_grad(input, weight, features, weight_grad),
        fake_vector_grad(input, weight, features, bias_grad),
    )


fold_rows("layer_norm", batched=(0,), per_sample=())
fold_rows("layer_norm_backward", batched=(0, 1, 3, 4), per_sample=(5, 6))
