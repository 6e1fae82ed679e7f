"""softmax and log_softmax with scale, mask and causal rule in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._derivatives import with_gradient
from ._front import FLOATS, autocast_enabled, fake, is_float, needs_grad, same_device
from ._function import differentiable, vmap_rule

_MOST_DIMS = 7  # of an input, in the kernels

#: (needs_grad's answer, mask given, is_causal) → options
_OPTIONS = with_gradient("mask", "is_causal")


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax of ``scale * input`` over ``dim``, of what ``mask`` and the causal rule allow.

    .. math:: \text{out}_j = \frac{m_j \exp(s x_j - \max)}{\sum_k m_k \exp(s x_k - \max)}

    A row with no allowed entry gives 0, never NaN. Sums are float32 for 16-bit inputs.

    Args:
        input: float tensor of any shape and strides.
        dim: the dimension that sums to one.
        scale: multiplies the input first; ``None`` = 1. May be zero or negative.
        mask: bool, broadcasts to ``input``; True takes part.
        is_causal: with ``dim=-1``, row i of dimension −2 sees columns ``j <= i``.
        dtype: the input is cast to it first, as in :func:`torch.nn.functional.softmax`.
        backend: forces one backend for this call.

    Raises:
        TypeError: ``input`` is not floating point, ``mask`` is not bool.
        ValueError: ``mask`` does not broadcast; ``is_causal`` with another ``dim`` or rank < 2.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.

    >>> import torch, fasttransformer as ft
    >>> ft.softmax(torch.tensor([[1.0, 1.0, 9.0]]), mask=torch.tensor([True, True, False]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    return _softmax("softmax", input, dim, scale, mask, is_causal, dtype, backend)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Logarithm of :func:`softmax`, computed without forming it; entries left out give −inf.

    .. math:: y_i = s_i - \log \sum_{j \text{ allowed}} e^{s_j}, \qquad s = \text{scale} \cdot x

    Arguments, shapes and dtypes are :func:`softmax`'s.

    Raises:
        TypeError, ValueError: as :func:`softmax`.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867).

    >>> import torch, fasttransformer as ft
    >>> ft.log_softmax(torch.tensor([0.0, 0.0])).exp()
    tensor([0.5000, 0.5000])
    """
    return _softmax("log_softmax", input, dim, scale, mask, is_causal, dtype, backend)


def _softmax(
    op: str,
    input: Tensor,
    dim: int,
    scale: float | None,
    mask: Tensor | None,
    is_causal: bool,
    dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor:
    if not isinstance(input, Tensor) or input.dtype not in FLOATS:
        is_float(op, input=input)
    rank = input.dim()
    if not -(rank or 1) <= dim < (rank or 1):
        raise ValueError(f"{op}: dim is {dim}, but input has {rank} dimensions")
    if mask is not None:
        mask = _expand_mask(op, mask, input)
    last = dim == -1 or dim == rank - 1
    if is_causal and (rank < 2 or not last):
        raise ValueError(f"{op}: is_causal needs dim=-1 and two dimensions or more, got dim={dim} "
                         f"and {rank} dimensions")  # fmt: skip
    device_type = input.device.type
    if dtype is not None:
        if dtype not in FLOATS:
            raise TypeError(f"{op}: dtype is {dtype}; it must be a floating-point type")
        input = input.to(dtype)
    elif device_type != "cpu" and autocast_enabled(device_type):
        # As in torch: softmax is on the float32 list of autocast on GPUs, and on none on the CPU.
        input = input if input.dtype == torch.float64 else input.float()
    scale = 1.0 if scale is None else float(scale)
    grad = needs_grad(input)
    options = _OPTIONS[grad, mask is not None, is_causal]
    kernel = choose(op, device_type, input.dtype, options, (), backend)
    if kernel.forward is None:
        function = getattr(reference, op)
        return function(input, dim, scale=scale, mask=mask, is_causal=is_causal)
    x = input
    if rank == 0 or rank > _MOST_DIMS or not last:
        x = _kernel_view(input, dim, is_causal)
        mask = None if mask is None else _kernel_view(mask, dim, is_causal)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    run = _softmax_with_grad if grad else kernel.forward
    args = (x, scale, mask, is_causal, op == "log_softmax")
    out = run(*args, kernel) if grad else run(*args)
    if rank == 0 or rank > _MOST_DIMS:
        out = out.view(input.shape if last else input.movedim(dim, -1).shape)
    return out if last or rank == 0 else out.movedim(-1, dim)


def _kernel_view(x: Tensor, dim: int, is_causal: bool) -> Tensor:
    """``dim`` last, and no more leading dimensions than kernels take."""
    if x.dim() == 0:
        return x.view(1)
    x = x.movedim(dim, -1)
    if x.dim() <= _MOST_DIMS:
        return x
    # The causal rule needs the last two dimensions as they are.
    return x.flatten(0, -3) if is_causal else x.flatten(0, -2)


def _expand_mask(op: str, mask: Tensor, input: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}; it must be bool, True = takes part "
                        "(add a float mask to the input instead)")  # fmt: skip
    same_device(op, input, mask=mask)
    try:
        return mask.expand(input.shape)
    except RuntimeError:
        raise ValueError(f"{op}: mask of shape {tuple(mask.shape)} does not broadcast to input's "
                         f"shape {tuple(input.shape)}") from None  # fmt: skip


class _Softmax:
    @staticmethod
    def forward(x, scale, mask, is_causal, log, kernel):
        return kernel.forward(x, scale, mask, is_causal, log)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.scale, mask, is_causal, ctx.log, ctx.kernel = inputs
        # A left-out entry of log softmax is −inf whatever the input: what comes back is dropped.
        ctx.drops = ctx.log and (mask is not None or is_causal)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        if ctx.drops:
            grad = grad.masked_fill(out == -torch.inf, 0)
        d_input = ctx.kernel.backward(grad.contiguous(), out, ctx.scale, ctx.log)
        return d_input, None, None, None, None, None


_softmax_with_grad = differentiable(_Softmax, tensors=1)


@fake("softmax")
def _(input, scale, mask, is_causal, log):
    return input.new_empty(input.shape)


@fake("softmax_backward")
def _(grad, output, scale, log):
    return output.new_empty(output.shape)


@vmap_rule("softmax")
def _(operator, batch_size, in_dims, input, scale, mask, is_causal, log):
    if in_dims[0] is None or input.dim() > _MOST_DIMS:
        return None
    x = input.movedim(in_dims[0], 0)
    if mask is not None:
        mask = mask.expand(x.shape) if in_dims[2] is None else mask.movedim(in_dims[2], 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return operator(x, scale, mask, is_causal, log), 0


@vmap_rule("softmax_backward")
def _(operator, batch_size, in_dims, grad, output, scale, log):
    if None in in_dims[:2]:
        return None
    grad, output = (t.movedim(d, 0).contiguous() for t, d in zip((grad, output), in_dims))
    return operator(grad, output, scale, log), 0
