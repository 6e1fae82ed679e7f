"""Cross entropy of a linear layer's output; the logits of all rows never exist at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import autocast_dtype, is_float, needs_grad, same_device, same_dtype
from ._output_layer import by_rows, check_loss, reduced
from .linear_add import autocast_linear

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


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
    backend: str | None = None,
) -> Tensor:
    r"""Cross entropy of a linear layer, as :func:`torch.nn.functional.linear_cross_entropy`.

    .. math:: L = \text{cross\_entropy}(X W^\top + b,\; y)

    The logits are computed piece by piece of the rows, and once more in the backward pass, so
    memory does not grow with rows × classes.

    Args:
        input: (in_features,) or (batch, in_features).
        linear_weight: (classes, in_features), or (classes, \*, in_features) for a loss over more
            dimensions.
        target: as of :func:`~fasttransformer.cross_entropy`, for logits (batch, classes, \*).
        linear_bias: (classes,) or (classes, \*).
        weight, reduction, label_smoothing: as of :func:`~fasttransformer.cross_entropy`.
        ignore_index: marks rows to leave out; ``None``, torch's default, is −100.
        backend: forces one backend for this call.

    Returns:
        A scalar, or with ``"none"`` a loss per row, in ``input``'s dtype. Under autocast the
        product's inputs are cast to its dtype and the loss is float32.

    Raises:
        TypeError: not floating point, dtypes that differ; a target of bools.
        ValueError: shapes that don't fit; a class outside [0, classes); an option out of range.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024
    (arXiv:2411.09009).

    >>> import torch, fasttransformer as ft
    >>> ft.linear_cross_entropy(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))  # log 4
    tensor(1.3863)
    """
    op = "linear_cross_entropy"
    is_float(op, input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    same_device(op, input, linear_weight=linear_weight, linear_bias=linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    shape = _logits_shape(op, input, linear_weight, linear_bias)
    target = check_loss(op, input, shape, target, weight, reduction, ignore_index, label_smoothing)
    autocast = autocast_dtype(input.device.type) is not None
    input, linear_weight, linear_bias = autocast_linear(input, linear_weight, linear_bias)
    same_dtype(op, input, linear_weight=linear_weight, linear_bias=linear_bias)
    options = _GRAD if needs_grad(input, linear_weight, linear_bias, target, weight) else _NONE
    choose(op, input.device.type, input.dtype, options, (), backend)
    wide = torch.promote_types(input.dtype, torch.float32)
    out_dtype = wide if autocast else input.dtype

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
