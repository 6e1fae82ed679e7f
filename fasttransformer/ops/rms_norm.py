"""Root-mean-square normalization, torch's own signature."""

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
    default_eps,
    fake_statistic,
    fake_vector_grad,
    fold_rows,
    rows_of,
    shaped,
    vector_of,
)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Root-mean-square normalization, as :func:`torch.nn.functional.rms_norm`.

    .. math:: y = \frac{x}{\sqrt{\frac{1}{C} \sum_j x_j^2 + \epsilon}} \odot w

    Args:
        input: (\*, \*normalized_shape), float of any strides.
        normalized_shape: the trailing dimensions to normalize over.
        weight: ``normalized_shape``, of any float dtype; the result has ``input``'s dtype.
        eps: 0 or more; ``None`` is torch's rule, the machine epsilon of the dtype that is computed
            in: float32's for 16-bit inputs.
        backend: forces one backend for this call.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that don't fit, eps negative, tensors on different devices.

    Source: Zhang, Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

    >>> import torch, fasttransformer as ft
    >>> ft.rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), (4,))
    tensor([[1.2000, 1.6000, 0.0000, 0.0000]])
    """
    shape = checked_shape("rms_norm", input, normalized_shape, eps)
    w = vector_of("rms_norm", "weight", weight, input, shape)
    input = autocast_input(input)
    if eps is None:
        eps = default_eps(input)
    grad = needs_grad(input, weight)
    options = GRAD_OPTIONS[grad]
    kernel = choose("rms_norm", device_type_of(input), input.dtype, options, (), backend)
    if kernel.forward is None or 0 in shape:
        return reference.rms_norm(input, shape, weight, eps)
    if grad:
        return _rms_norm(input, w, eps, shape, kernel)
    x = rows_of(input, shape)
    return shaped(kernel.forward(x, w, eps)[0], x, input)


class _RMSNorm:
    @staticmethod
    def forward(input, weight, eps, shape, kernel):
        x = rows_of(input, shape)
        out, rstd = kernel.forward(x, weight, eps)
        return shaped(out, x, input), rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.shape, ctx.kernel = inputs
        ctx.save_for_backward(input, weight, output[1])

    @staticmethod
    def backward(ctx, grad):
        input, weight, rstd = ctx.saved_tensors
        shape, wanted = ctx.shape, ctx.needs_input_grad[1]
        x = rows_of(input, shape)
        d_input, d_weight = ctx.kernel.backward(rows_of(grad, shape), x, weight, rstd, wanted)
        return shaped(d_input, x, input), d_weight if wanted else None, None, None, None


_rms_norm = differentiable(_RMSNorm, tensors=2, outputs=1)


@fake("rms_norm")
def _(input, weight, eps):
    return input.new_empty(input.shape), fake_statistic(input)


@fake("rms_norm_backward")
def _(grad, input, weight, rstd, weight_grad):
    return (
        input.new_empty(input.shape),
        fake_vector_grad(input, weight, input.shape[-1], weight_grad),
    )


fold_rows("rms_norm", batched=(0,), per_sample=())
fold_rows("rms_norm_backward", batched=(0, 1, 3), per_sample=(4,))
