"""What the output layer's operations share: checks, and work in pieces of rows, so that the logits
of all rows never exist at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._front import is_float, is_float_if_given, last_stride_one, same_device
from ._index import checked_index, is_index
from .linear_add import check_linear

#: The most logits that exist at a time: 128 MB in float32. Larger pieces are no faster on a CPU.
PIECE = 1 << 25
#: float32's smallest normal number.
SMALLEST = 2.0**-126
REDUCTIONS = ("none", "mean", "sum")


def in_one_piece(logits: int | torch.SymInt) -> bool:
    return logits <= PIECE


def by_rows(function: Callable[..., Any], columns: int, *rows: Tensor) -> Any:
    """``function(*rows)``, which gives one or several results per row, over pieces of the rows.

    ``columns`` is the number of logits of a row. Where a gradient is needed, a piece keeps its
    inputs only and is computed again in the backward pass.
    """
    if in_one_piece(rows[0].shape[0] * columns):
        return function(*rows)
    height = max(1, PIECE // columns)
    results = []
    for piece in zip(*(x.split(height) for x in rows)):
        if torch.is_grad_enabled():
            results.append(
                checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            results.append(function(*piece))
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(part) for part in zip(*results))


def check_output_layer(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A linear layer's arguments; attention's (batch, heads, q_len, head_dim) is not taken."""
    is_float(op, input=input, weight=weight)
    is_float_if_given(op, bias=bias)
    if weight.dim() == 2 and input.dim() > 0 and input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input of shape {tuple(input.shape)} does not fit weight's shape "
            f"{tuple(weight.shape)}: its last dimension must be {weight.shape[1]}"
        )
    check_linear(op, input, weight, bias, None)


def kernel_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as the output layer's operators take them: rows of two dimensions, the
    others contiguous."""
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    return last_stride_one(rows), weight.contiguous(), None if bias is None else bias.contiguous()


def check_temperature(op: str, temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}; it must be a positive finite number")
    if temperature < SMALLEST:  # kernels would divide by 0
        raise ValueError(f"{op}: temperature is {temperature}; it must be {SMALLEST:.2g} or more")


def check_loss(
    op: str,
    input: Tensor,
    logits_shape: tuple[int, ...],
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    check_ids: Callable[..., Tensor] = checked_index,
) -> Tensor:
    """Raises unless the arguments of a loss over logits of that shape fit; returns the target,
    class ids by ``check_ids``: as int64 that are known to be in range."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}"
        )
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index is {ignore_index!r}; it must be an integer")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"{op}: ignore_index is {ignore_index}; it must fit into 64 bits")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must be in [0, 1]")
    classes = logits_shape[0] if len(logits_shape) == 1 else logits_shape[1]
    plain = (  # nothing to find fault with, at a look
        weight is None
        and isinstance(target, Tensor)
        and target.dtype is torch.int64
        and target.device == input.device
    )
    if not plain:
        _check_target_and_weight(op, input, logits_shape, classes, target, weight, ignore_index)
        if target.is_floating_point():
            return target
    shape = logits_shape[:0] if len(logits_shape) == 1 else (logits_shape[0], *logits_shape[2:])
    if target.shape != shape:
        raise ValueError(
            f"{op}: target has shape {tuple(target.shape)}; logits of shape "
            f"{logits_shape} need {shape}"
        )
    return check_ids(op, "target", target, classes, ignore_index)


def _check_target_and_weight(
    op: str,
    input: Tensor,
    logits_shape: tuple[int, ...],
    classes: int,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> None:
    is_float_if_given(op, weight=weight)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; it must be (classes,) = ({classes},)"
        )
    same_device(op, input, weight=weight)
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    same_device(op, input, target=target)
    if not target.is_floating_point():
        return is_index(op, target=target)
    is_float(op, target=target)
    if target.shape != logits_shape:
        raise ValueError(
            f"{op}: target holds probabilities and has shape "
            f"{tuple(target.shape)}; it must be the logits', {logits_shape}"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"{op}: ignore_index is {ignore_index}, but target holds "
            "probabilities, in which there is no class to ignore"
        )


def reduced(
    losses: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    """The losses of all rows, summed or averaged as :func:`fasttransformer.cross_entropy` says."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if target.is_floating_point():
        return total / losses.numel()
    kept = target != ignore_index
    if weight is None:
        return total / kept.sum()
    return total / torch.where(kept, weight.to(losses.dtype)[torch.where(kept, target, 0)], 0).sum()


def reduced_losses(losses: Tensor, statistics: Tensor, mean: bool) -> Tensor:
    """The sum of a kernel's losses, or their mean by the classes' weights, which are 0 in rows that
    are left out."""
    loss = losses.sum()
    return loss / statistics.select(1, 2).sum() if mean else loss
