"""softmax and log_softmax with scale, mask and causal rule in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import fake, is_float, needs_grad, same_device

_OPTIONS = {
    (grad, mask, causal): frozenset(
        name
        for name, used in (("grad", grad), ("mask", mask), ("is_causal", causal))
        if used
    )
    for grad in (False, True)
    for mask in (False, True)
    for causal in (False, True)
}  # fmt: skip


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
    r"""Softmax of ``scale * input`` over ``dim``, of the entries that ``mask`` and the causal rule allow.

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

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (the GPU kernels).

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
    """Logarithm of :func:`softmax`, computed without forming it; entries left out give −inf.

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
    is_float(op, input=input)
    rank = input.dim()
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise ValueError(f"{op}: dim is {dim}, but input has {rank} dimensions")
    if mask is not None:
        mask = _expand_mask(op, mask, input)
    if is_causal and (rank < 2 or dim not in (-1, rank - 1)):
        raise ValueError(f"{op}: is_causal needs dim=-1 and two dimensions or more, got dim={dim} "
                         f"and {rank} dimensions")  # fmt: skip
    if dtype is not None:
        input = input.to(dtype)
    elif torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        input = input.float()  # softmax is on autocast's float32 list
    scale = 1.0 if scale is None else float(scale)
    grad = needs_grad(input)
    options = _OPTIONS[grad, mask is not None, is_causal]
    kernel = choose(op, input.device.type, input.dtype, options, (), backend)
    if kernel.forward is None:
        function = getattr(reference, op)
        return function(input, dim, scale=scale, mask=mask, is_causal=is_causal)
    last = rank == 0 or dim in (-1, rank - 1)
    x = _last_stride_one(input.reshape(1) if rank == 0 else input if last else input.movedim(dim, -1))
    if mask is not None:
        mask = mask.reshape(1) if rank == 0 else mask if last else mask.movedim(dim, -1)
    log = op == "log_softmax"
    if grad:
        out = _Softmax.apply(x, scale, mask, is_causal, log, kernel)
    else:
        out = kernel.forward(x, scale, mask, is_causal, log)
    if rank == 0:
        return out.reshape(())
    return out if last else out.movedim(-1, dim)


def _expand_mask(op: str, mask: Tensor, input: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}; it must be bool, True = takes part "
                        "(add a float mask to the input instead)")  # fmt: skip
    same_device(op, input, mask=mask)
    try:
        return mask.expand(input.shape)
    except RuntimeError:
        raise ValueError(f"{op}: mask of shape {tuple(mask.shape)} does not broadcast to input's "
                         f"shape {tuple(input.shape)}") from None  # fmt: skip


def _last_stride_one(x: Tensor) -> Tensor:
    if x.dim() > 7 or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return x.contiguous()
    return x


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, mask, is_causal, log, kernel):
        out = kernel.forward(x, scale, mask, is_causal, log)
        ctx.save_for_backward(out)
        ctx.scale, ctx.log, ctx.kernel = scale, log, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        d_input = ctx.kernel.backward(grad.contiguous(), out, ctx.scale, ctx.log)
        return d_input, None, None, None, None, None


@fake("softmax")
def _(input, scale, mask, is_causal, log):
    return input.new_empty(input.shape)


@fake("softmax_backward")
def _(grad, output, scale, log):
    return output.new_empty(output.shape)
