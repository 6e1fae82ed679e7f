"""Layer normalization, torch's own signature."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import GRAD_OPTIONS, device_type_of, fake, needs_grad
from ._function import differentiable
from ._norm import (
    autocast_input,
    checked_shape,
    fake_statistic,
    fake_vector_grad,
    fold_rows,
    rows_of,
    shaped,
    vector_of,
    wide_bias,
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
    w = vector_of("layer_norm", "weight", weight, input, shape)
    b = vector_of("layer_norm", "bias", bias, input, shape)
    input = autocast_input(input)
    grad = needs_grad(input, weight, bias)
    options = GRAD_OPTIONS[grad]
    kernel = choose("layer_norm", device_type_of(input), input.dtype, options, (), backend)
    if kernel.forward is None or 0 in shape:
        return reference.layer_norm(input, shape, weight, bias, eps)
    if grad:
        return _layer_norm(input, w, b, eps, shape, kernel)
    x = rows_of(input, shape)
    return shaped(kernel.forward(x, w, b, eps)[0], x, input)


class _LayerNorm:
    @staticmethod
    def forward(input, weight, bias, eps, shape, kernel):
        x = rows_of(input, shape)
        out, mean, rstd = kernel.forward(x, weight, bias, eps)
        return shaped(out, x, input), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, _, ctx.shape, ctx.kernel = inputs
        ctx.wide_bias = wide_bias(weight, bias)
        ctx.save_for_backward(input, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad):
        input, weight, mean, rstd = ctx.saved_tensors
        shape, needs = ctx.shape, ctx.needs_input_grad
        x = rows_of(input, shape)
        d_input, d_weight, d_bias = ctx.kernel.backward(
            rows_of(grad, shape), x, weight, mean, rstd, needs[1],
            needs[2], *ctx.wide_bias,
        )  # fmt: skip
        return (
            shaped(d_input, x, input), d_weight if needs[1] else None, d_bias if needs[2] else None,
            None, None, None,
        )  # fmt: skip


_layer_norm = differentiable(_LayerNorm, tensors=3, outputs=1)


@fake("layer_norm")
def _(input, weight, bias, eps):
    return input.new_empty(input.shape), fake_statistic(input), fake_statistic(input)


@fake("layer_norm_backward")
def _(grad, input, weight, mean, rstd, weight_grad, bias_grad, wide_bias=False):
    features = input.shape[-1]
    return (
        input.new_empty(input.shape),
        fake_vector_grad(input, weight, features, weight_grad),
        fake_vector_grad(input, weight, features, bias_grad, wide_bias),
    )


fold_rows("layer_norm", batched=(0,), per_sample=())
fold_rows("layer_norm_backward", batched=(0, 1, 3, 4), per_sample=(5, 6))
