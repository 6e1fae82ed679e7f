"""Cross entropy of a linear layer's output; the logits of all rows never exist at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ..reference.cross_entropy import loss_dtype
from ._derivatives import many_cotangents, transforms_active
from ._front import (
    GRAD_OPTIONS,
    autocast_dtype,
    fake,
    float32_at_most,
    is_float,
    is_float_if_given,
    needs_grad,
    same_device,
    same_dtype,
)
from ._function import differentiable, fold, unfold, vmap_rule
from ._index import checked_first, checked_index, kernel_ids
from ._output_layer import by_rows, check_loss, kernel_operands, reduced, reduced_losses
from .linear_add import autocast_linear

#: dtypes whose gradients may be rounded before the upstream gradient multiplies them. float16 has
#: too few exponents for that: of a mean over 4096 rows little is left until a loss scale comes in.
_SCALED_LATER = (torch.float32, torch.bfloat16)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    r"""Cross entropy of a linear layer, as :func:`torch.nn.functional.linear_cross_entropy`.

    .. math:: L = \text{cross\_entropy}(X W^\top + b,\; y)

    The logits are computed piece by piece of the rows, so memory does not grow with rows × classes.
    Where a mean or a sum needs a gradient, it is computed with the loss, while a piece's logits are
    there: three products in all. Single losses (``"none"``) and float16 compute the logits once
    more in the backward pass.

    Args:
        input: (in_features,) or (batch, in_features).
        linear_weight: (classes, in_features), or (classes, \*, in_features) for a loss over more
            dimensions.
        target: as of :func:`~fasttransformer.cross_entropy`, for logits (batch, classes, \*).
        linear_bias: (classes,) or (classes, \*).
        weight, reduction, label_smoothing: as of :func:`~fasttransformer.cross_entropy`.
        ignore_index: marks rows to leave out, which cost nothing; ``None``, torch's default, is
            −100.
        options: a :class:`torch.nn.LinearCrossEntropyOptions` (torch 2.13 and later) or ``None``.
            The rows are always worked on in pieces, sums are float32, and the graph may be kept,
            so all its choices are met; ``acc_dtype=torch.float64`` of narrower inputs is refused.
        backend: forces one backend for this call.

    Returns:
        A scalar, or with ``"none"`` a loss per row, in ``input``'s dtype (with probabilities, as of
        :func:`~fasttransformer.cross_entropy`). Under autocast the product's inputs are cast to its
        dtype and the loss is float32.

    Raises:
        TypeError: not floating point, dtypes that differ; a target of bools.
        ValueError: shapes that don't fit; a class outside [0, classes); an option out of range.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024
    (arXiv:2411.09009); gradients with the loss: Hsu et al., Liger Kernel, 2024 (arXiv:2410.10989).

    >>> import torch, fasttransformer as ft
    >>> ft.linear_cross_entropy(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))  # log 4
    tensor(1.3863)
    """
    op = "linear_cross_entropy"
    is_float(op, input=input, linear_weight=linear_weight)
    is_float_if_given(op, linear_bias=linear_bias)
    same_device(op, input, linear_weight=linear_weight, linear_bias=linear_bias)
    if options is not None:
        _check_options(op, options, input)
    ignore_index = -100 if ignore_index is None else ignore_index
    shape = _logits_shape(op, input, linear_weight, linear_bias)
    target = check_loss(
        op, input, shape, target, weight, reduction, ignore_index, label_smoothing, checked_first
    )
    autocast = autocast_dtype(input.device.type) is not None
    input, linear_weight, linear_bias = autocast_linear(input, linear_weight, linear_bias)
    same_dtype(op, input, linear_weight=linear_weight, linear_bias=linear_bias)
    grad = needs_grad(input, linear_weight, linear_bias, target, weight)
    used = {
        "weight_grad": needs_grad(weight),
        "probabilities": target.is_floating_point(),
        "more_dimensions": linear_weight.dim() > 2,
    }
    in_use = GRAD_OPTIONS[grad] | {name for name, value in used.items() if value}
    kernel = choose(op, input.device.type, input.dtype, in_use, (), backend)
    wide = torch.promote_types(input.dtype, torch.float32)
    out_dtype = loss_dtype(input, target, weight)
    out_dtype = torch.promote_types(out_dtype, torch.float32) if autocast else out_dtype
    if not target.is_floating_point() and target.device.type != "cpu" and kernel.backend != "cuda":
        target = checked_index(op, "target", target, linear_weight.shape[0], ignore_index)
    if kernel.forward is not None:
        loss = _on_kernel(
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            kernel,
        )
        return loss.to(out_dtype)

    def losses(rows: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
        # The rows are widened first so that the losses are rounded once, after the reduction.
        return reference.linear_cross_entropy(
            rows.to(wide),
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    if input.dim() == 1:
        return losses(input, target, reduction).to(out_dtype)
    rows = by_rows(losses, math.prod(linear_weight.shape[:-1]), input, target)
    return reduced(rows, target, weight, reduction, ignore_index).to(out_dtype)


def _check_options(op: str, options: Any, input: Tensor) -> None:
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # torch 2.13 and later
    if kind is None or not isinstance(options, kind):
        raise TypeError(
            f"{op}: options must be a torch.nn.LinearCrossEntropyOptions or None, got "
            f"{type(options).__name__}"
        )
    if options.acc_dtype == torch.float64 and input.dtype != torch.float64:
        raise ValueError(
            f"{op}: options.acc_dtype is torch.float64, but sums over {input.dtype} are float32"
        )


def _logits_shape(
    op: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[int, ...]:
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}; it must be (in_features,) or "
            "(batch, in_features)"
        )
    if linear_weight.dim() < 2:
        raise ValueError(
            f"{op}: linear_weight has shape {tuple(linear_weight.shape)}; it must be "
            "(classes, in_features) or (classes, *, in_features)"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(
            f"{op}: linear_weight of shape {tuple(linear_weight.shape)} needs an input "
            "(batch, in_features)"
        )
    *outer, in_features = linear_weight.shape
    if input.shape[-1] != in_features:
        raise ValueError(
            f"{op}: input of shape {tuple(input.shape)} does not fit linear_weight's "
            f"in_features {in_features}"
        )
    if linear_bias is not None and linear_bias.shape not in ((outer[0],), tuple(outer)):
        raise ValueError(
            f"{op}: linear_bias has shape {tuple(linear_bias.shape)}; linear_weight's "
            f"makes it ({outer[0]},)" + (f" or {tuple(outer)}" if outer[1:] else "")
        )
    return (*input.shape[:-1], *outer)


# ---- kernels ------------------------------------------------------------------------------------


def _on_kernel(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    kernel: Kernel,
) -> Tensor:
    """The loss or losses in float32."""
    if weight is not None:
        weight = float32_at_most(weight).contiguous()
    operands = (
        *kernel_operands(input, linear_weight, linear_bias),
        kernel_ids(target).view(-1),
        weight,
    )
    options = (ignore_index, float(label_smoothing))
    wanted = tuple(needs_grad(x) for x in (input, linear_weight, linear_bias))
    mean = reduction == "mean"
    if not any(wanted):
        losses, statistics = kernel.forward(*operands, *options, False, *wanted)[:2]
    elif reduction != "none" and input.dtype in _SCALED_LATER:
        return _reduced_with_grad(*operands, *options, mean, wanted, kernel)
    else:
        losses, statistics = _losses_with_grad(*operands, *options, kernel)
    if reduction == "none":
        return losses.view(target.shape)
    return reduced_losses(losses, statistics, mean)


class _Losses:
    """Loss by loss; their gradients need the logits once more."""

    @staticmethod
    def forward(x, weight, bias, target, class_weight, ignore_index, smoothing, kernel):
        no_grads = (False, False, False, False)
        return kernel.forward(
            x, weight, bias, target, class_weight, ignore_index, smoothing, *no_grads
        )[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.smoothing, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        wanted = ctx.needs_input_grad[:3]
        gradients = ctx.kernel.backward(
            grad, *ctx.saved_tensors, ctx.ignore_index, ctx.smoothing, *wanted
        )
        return (*_given(gradients, wanted), *(None,) * 5)


class _Reduced:
    """The sum or mean, whose gradients are made beside it but for the upstream factor."""

    @staticmethod
    def forward(
        x, weight, bias, target, class_weight, ignore_index, smoothing, mean, wanted, kernel
    ):
        losses, statistics, *gradients = kernel.forward(
            x, weight, bias, target, class_weight, ignore_index, smoothing, mean, *wanted
        )
        return reduced_losses(losses, statistics, mean), *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.wanted = inputs[8]
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad):
        gradients = _given(ctx.saved_tensors, ctx.wanted)
        return (*(None if g is None else _scaled(g, grad) for g in gradients), *(None,) * 7)


_losses_with_grad = differentiable(_Losses, tensors=5)
_reduced_with_grad = differentiable(_Reduced, tensors=5, outputs=1)


def _given(gradients: Any, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if w else None for g, w in zip(gradients, wanted))


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs may run again over the same graph."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """``gradient * grad``: as it is where grad is 1, in place where nothing will read it again."""
    plain = type(grad) is Tensor and not torch.compiler.is_compiling()
    if not plain or not grad.is_cpu or transforms_active() or many_cotangents(grad):
        return gradient * grad
    if _graph_is_kept():
        return gradient * grad
    return gradient if grad.item() == 1.0 else gradient.mul_(grad)


@fake("linear_cross_entropy")
def _(
    input, weight, bias, target, class_weight, ignore_index, label_smoothing, mean, input_grad,
    weight_grad, bias_grad,
):  # fmt: skip
    rows = input.shape[0]
    return (
        input.new_empty((rows,), dtype=torch.float32),
        input.new_empty((rows, 4), dtype=torch.float32),
        *_fake_gradients(input, weight, input_grad, weight_grad, bias_grad),
    )


@fake("linear_cross_entropy_backward")
def _(
    grad, input, weight, bias, target, class_weight, statistics, ignore_index, label_smoothing,
    input_grad, weight_grad, bias_grad,
):  # fmt: skip
    return _fake_gradients(input, weight, input_grad, weight_grad, bias_grad)


def _fake_gradients(input, weight, input_grad, weight_grad, bias_grad):
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        input.new_empty(weight.shape if weight_grad else (0,)),
        input.new_empty((weight.shape[0],) if bias_grad else (0,)),
    )


@vmap_rule("linear_cross_entropy")
def _(operator, batch_size, in_dims, input, weight, bias, target, class_weight, *options):
    # Samples are only more rows unless a sum over the rows is wanted.
    if any(d is not None for d in (in_dims[1], in_dims[2], in_dims[4])) or any(options[-3:]):
        return None
    rows = fold(input, in_dims[0], batch_size), fold(target, in_dims[3], batch_size)
    losses, statistics, *absent = operator(rows[0], weight, bias, rows[1], class_weight, *options)
    outputs, dims = unfold((losses, statistics), batch_size)
    return (*outputs, *absent), (*dims, *(None,) * len(absent))


@vmap_rule("linear_cross_entropy_backward")
def _(operator, batch_size, in_dims, *args):
    return None
