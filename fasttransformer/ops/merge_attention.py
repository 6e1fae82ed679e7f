"""Exact merge of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ._derivatives import many_cotangents
from ._front import (
    GRAD_OPTIONS,
    fake,
    is_float,
    last_stride_one,
    needs_grad,
    same_device,
    same_dtype,
)
from ._function import differentiable, vmap_rule

#: Of one call of a kernel (csrc/params/merge_attention.h); more are merged in groups of as many.
_MOST_PARTS = 16


def merge_attention(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention over all keys, from attention over parts of them.

    .. math:: \text{lse} = \log \sum_p e^{\text{lse}_p}, \qquad
        \text{out} = \sum_p e^{\text{lse}_p - \text{lse}}\, \text{out}_p

    Softmax's numerator and denominator are sums over keys, so the merge is exact to rounding. A
    part without any key has lse −inf and counts nothing; where no part has a key, out is 0 and lse
    −inf.

    Args:
        outs: the parts' outputs, each (\*, value_dim): a sequence, or a tensor with the parts in
            front.
        lses: the parts' log-sum-exps, each (\*), float32 (float64 with float64 outputs), as
            ``ft.attention(..., return_lse=True)`` gives them.
        backend: forces one backend for this call.

    Returns:
        (out, lse), in the parts' shapes and dtypes. Both can be differentiated and merged again.

    Raises:
        TypeError: not floating point, dtypes that differ.
        ValueError: no parts, not as many lses as outs, shapes that differ.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867); Dao et al., FlashAttention, 2022 (arXiv:2205.14135).

    >>> import torch, fasttransformer as ft
    >>> ft.merge_attention(torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[0.0], [0.0]]))
    (tensor([[3.]]), tensor([0.6931]))
    """
    op = "merge_attention"
    stacked = (outs, lses) if isinstance(outs, Tensor) and isinstance(lses, Tensor) else None
    outs, lses = (_parts(op, name, parts) for name, parts in (("outs", outs), ("lses", lses)))
    given = stacked or (*outs, *lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"{op}: there are {len(outs)} outs and {len(lses)} lses; it must be as many "
            "of both, one or more"
        )
    first = outs[0]
    if first.dim() == 0:
        raise ValueError(f"{op}: outs[0] has no dimensions; it must be (*, value_dim)")
    wide = torch.promote_types(first.dtype, torch.float32)
    for i, (out, lse) in enumerate(zip(outs, lses)):
        same_device(op, first, **{f"outs[{i}]": out, f"lses[{i}]": lse})
        same_dtype(op, first, **{f"outs[{i}]": out})
        if lse.dtype != wide:
            raise TypeError(
                f"{op}: lses[{i}] has dtype {lse.dtype}; with outs of {first.dtype} it "
                f"must be {wide}"
            )
        if out.shape != first.shape:
            raise ValueError(
                f"{op}: outs[{i}] has shape {tuple(out.shape)}, but outs[0] has "
                f"{tuple(first.shape)}"
            )
        if lse.shape != first.shape[:-1]:
            raise ValueError(
                f"{op}: lses[{i}] has shape {tuple(lse.shape)}; outs[0]'s makes it "
                f"{tuple(first.shape[:-1])}"
            )
    grad = needs_grad(*given)
    kernel = choose(op, first.device.type, first.dtype, GRAD_OPTIONS[grad], (), backend)
    if kernel.forward is None:
        return reference.merge_attention(outs, lses)
    if first.dim() > 4:
        shape = first.shape[:-1]
        out, lse = _merge([o.flatten(0, -2) for o in outs], [l.flatten() for l in lses], kernel)
        return out.unflatten(0, shape), lse.unflatten(0, shape)
    if stacked is not None and grad and stacked[0].stride(-1) == 1:
        return _differentiable(kernel, True, *stacked)
    return _merge(outs, lses, kernel)


def _merge(outs: list[Tensor], lses: list[Tensor], kernel: Kernel) -> tuple[Tensor, Tensor]:
    outs = [last_stride_one(out) for out in outs]
    if needs_grad(*outs, *lses):
        return _differentiable(kernel, False, *outs, *lses)
    return _forward(kernel, outs, lses)


# More parts than a kernel takes are merged in groups, and what comes of the groups again. What a
# group hands on is float32, both ways: only what the caller gets is rounded to his dtype.


def _forward(
    kernel: Kernel, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    if len(outs) <= _MOST_PARTS:
        return kernel.forward(outs, lses)
    merged = [kernel.forward(*group) for group in _groups(outs, lses)]
    out, lse = _forward(kernel, *zip(*merged))
    return out.to(outs[0].dtype), lse


def _backward(
    kernel: Kernel,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The gradients of all parts, (parts, …); the groups are merged again."""
    if len(outs) <= _MOST_PARTS:
        return kernel.backward(grad_out, grad_lse, outs, lses)
    merged = [kernel.forward(*group) for group in _groups(outs, lses)]
    of_groups = _backward(kernel, last_stride_one(grad_out.float()), grad_lse, *zip(*merged))
    d_outs, d_lses = [], []
    for d_out, d_lse, group in zip(*of_groups, _groups(outs, lses)):
        d_group = kernel.backward(d_out, d_lse, *group)
        d_outs.append(d_group[0].to(outs[0].dtype))
        d_lses.append(d_group[1])
    return torch.cat(d_outs), torch.cat(d_lses)


def _groups(
    outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
    """As many parts as a kernel takes at once, in float32."""
    for first in range(0, len(outs), _MOST_PARTS):
        group = slice(first, first + _MOST_PARTS)
        yield [last_stride_one(out.float()) for out in outs[group]], lses[group]


class _MergeAttention:
    """``parts`` are the outs and the lses, one by one or two tensors of stacked ones."""

    @staticmethod
    def forward(kernel, stacked, *parts):
        return _forward(kernel, *_outs_and_lses(stacked, parts))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernel, ctx.stacked = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        outs, lses = _outs_and_lses(ctx.stacked, ctx.saved_tensors)
        if many_cotangents(grad_out, grad_lse):
            raise NotImplementedError(
                "merge_attention: no gradients for several cotangents at once "
                '(is_grads_batched=True); backend="torch" has them, and so has torch.func.vmap'
            )
        if grad_out is None:
            if grad_lse is None:
                return (None,) * (2 + len(ctx.saved_tensors))
            grad_out = torch.zeros_like(outs[0])
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grad_out = last_stride_one(grad_out)
        grads: tuple[Tensor, ...] = _backward(ctx.kernel, grad_out, grad_lse, outs, lses)
        if not ctx.stacked:
            grads = (*grads[0].unbind(), *grads[1].unbind())
        return None, None, *grads


def _outs_and_lses(
    stacked: bool, parts: tuple[Tensor, ...]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    if stacked:
        return parts[0].unbind(), parts[1].unbind()
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]


_differentiable = differentiable(_MergeAttention, tensors=0)


@fake("merge_attention")
def _(outs, lses):
    out = torch.empty_like(outs[0], memory_format=torch.contiguous_format)
    if outs[0].dim() == 4 and not outs[0].is_contiguous():
        batch, heads, length, dim = outs[0].shape
        out = outs[0].new_empty((batch, length, heads, dim)).transpose(1, 2)
    return out, lses[0].new_empty(lses[0].shape)


@fake("merge_attention_backward")
def _(grad_out, grad_lse, outs, lses):
    return (
        outs[0].new_empty((len(outs), *outs[0].shape)),
        lses[0].new_empty((len(outs), *lses[0].shape)),
    )


# The mapped dimension is one more in front of the rows.


def _in_front(x: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    if x is None:
        return None
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


@vmap_rule("merge_attention")
def _(operator, count, in_dims, outs, lses):
    outs, lses = ([_in_front(x, d, count) for x, d in zip(xs, dims)]
                  for xs, dims in zip((outs, lses), in_dims))  # fmt: skip
    if outs[0].dim() > 4:
        return None
    return operator([last_stride_one(out) for out in outs], lses), (0, 0)


@vmap_rule("merge_attention_backward")
def _(operator, count, in_dims, grad_out, grad_lse, outs, lses):
    grad_out, grad_lse = (
        _in_front(grad_out, in_dims[0], count),
        _in_front(grad_lse, in_dims[1], count),
    )
    outs, lses = ([_in_front(x, d, count) for x, d in zip(xs, dims)]
                  for xs, dims in zip((outs, lses), in_dims[2:]))  # fmt: skip
    if outs[0].dim() > 4:
        return None
    grads = operator(
        last_stride_one(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        [last_stride_one(out) for out in outs],
        lses,
    )
    return grads, (1, 1)


def _parts(op: str, name: str, parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(parts, Tensor):
        is_float(op, **{name: parts})
        if parts.dim() == 0:
            raise ValueError(f"{op}: {name} has no dimensions; the first one is that of the parts")
        return list(parts.unbind())
    if not isinstance(parts, (list, tuple)):
        kind = type(parts).__name__
        raise TypeError(f"{op}: {name} must be a tensor or a list of tensors, got {kind}")
    parts = list(parts)
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise TypeError(f"{op}: {name}[{i}] must be a tensor, got {type(part).__name__}")
    is_float(op, **{f"{name}[{i}]": part for i, part in enumerate(parts)})
    return parts
