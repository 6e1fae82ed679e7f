"""What the fronts of the norms share: checks, the (rows, features) view, vmap by folding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._derivatives import with_gradient
from ._front import (
    FLOATS,
    autocast_enabled,
    device_type_of,
    is_float,
    last_stride_one,
    positive_eps,
    probability,
    same_device,
    same_dtype,
)
from ._function import fold, unfold, vmap_rule

#: (needs_grad's answer, dropout on) → options of the add + norm operations.
ADD_OPTIONS = with_gradient("dropout")


def add_options(op: str, grad: int, dropout_p: float) -> frozenset[str]:
    """The options of the operations that add with dropout."""
    drops = type(dropout_p) is not float or dropout_p != 0.0
    if drops:
        probability(op, dropout_p)
        drops = dropout_p != 0.0
    return ADD_OPTIONS[grad, drops]


def checked_shape(
    op: str, input: Tensor, normalized_shape: Sequence[int] | int, eps: float | None
) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, once input, shape and eps are known to be right."""
    if not isinstance(input, Tensor) or input.dtype not in FLOATS:
        is_float(op, input=input)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    given = input.shape
    if len(shape) == 1 and given:
        fits = given[-1] == shape[0]
    else:
        fits = shape != () and given[-len(shape) :] == shape
    if not fits:
        raise ValueError(f"{op}: normalized_shape {shape} must be one dimension or more and end "
                         f"input's shape {tuple(given)}")  # fmt: skip
    if eps is not None and not 0.0 <= eps < math.inf:
        positive_eps(op, eps)
    return shape


def vector_of(
    op: str,
    name: str,
    vector: Tensor | None,
    input: Tensor,
    shape: tuple[int, ...],
    rule: str = "normalized_shape is",
) -> Tensor | None:
    """A weight or bias, known to be right, as kernels read it: contiguous, of one dimension, and
    float64 only beside a float64 input (to a narrower one it is rounded)."""
    if vector is None:
        return None
    dtype = vector.dtype if isinstance(vector, Tensor) else None
    if dtype not in FLOATS:
        is_float(op, **{name: vector})
    if vector.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; {rule} {shape}")
    if vector.device != input.device:
        same_device(op, input, **{name: vector})
    if dtype == torch.float64 and input.dtype != torch.float64:
        vector = vector.float()
    if len(shape) == 1 and vector.is_contiguous():
        return vector
    return vector.contiguous().view(-1)


def add_inputs(op: str, input: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """input and residual of the add + norm operations, checked; under autocast in one dtype."""
    if not isinstance(residual, Tensor) or residual.dtype not in FLOATS:
        is_float(op, residual=residual)
    if residual.shape != input.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; it must be input's, "
                         f"{tuple(input.shape)}")  # fmt: skip
    if residual.device != input.device:
        same_device(op, input, residual=residual)
    if type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:
        probability(op, dropout_p)
    if residual.dtype != input.dtype:
        if not autocast_enabled(device_type_of(input)):
            same_dtype(op, input, residual=residual)
        # torch's own `residual + input` promotes: a 16-bit projection meets a float32 residual.
        wide = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(wide), residual.to(wide)
    return autocast_input(input), autocast_input(residual)


def autocast_input(input: Tensor) -> Tensor:
    """float32 where autocast is on and asks that of norms: it does on GPUs, not on the CPU."""
    if input.is_cpu or input.dtype == torch.float64 or not autocast_enabled(input.device.type):
        return input
    return input.float()


def default_eps(input: Tensor) -> float:
    """torch's rule for eps=None: the machine epsilon of the dtype that is computed in."""
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def rows_of(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(…, *normalized_shape) as operators take it: rows in the last dimension, contiguous, or of
    two dimensions with last stride 1. A view if it can be (1 µs), a copy only if need be."""
    if x.dim() >= 2 and len(shape) == 1:
        if x.is_contiguous():
            return x
        if x.dim() == 2:
            return last_stride_one(x)
    return last_stride_one(x.reshape(-1, math.prod(shape)))


def shaped(rows: Tensor, taken: Tensor, given: Tensor) -> Tensor:
    """The way back: an operator's output for ``taken = rows_of(given)`` in ``given``'s shape."""
    return rows if taken is given else rows.view(given.shape)


def fake_statistic(input: Tensor) -> Tensor:
    return input.new_empty((math.prod(input.shape[:-1]),), dtype=torch.float32)


def wide_bias(weight: Tensor | None, bias: Tensor | None) -> tuple[()] | tuple[bool]:
    """The last argument of backward operators where it isn't False: a bias of another dtype than
    the weight's has its gradient in float32, so that it is rounded once, by autograd's cast."""
    return (True,) if weight is not None and bias is not None and bias.dtype != weight.dtype else ()


def fake_vector_grad(
    input: Tensor, weight: Tensor | None, features: int, wanted: bool, wide: bool = False
) -> Tensor:
    """d_weight and d_bias of the backward operators: weight's dtype, float32 without a weight or
    if ``wide`` (:func:`wide_bias`)."""
    dtype = torch.float32 if weight is None or wide else weight.dtype
    return input.new_empty((features if wanted else 0,), dtype=dtype)


def fold_rows(op: str, batched: tuple[int, ...], per_sample: tuple[int, ...]) -> None:
    """vmap rule of a norm's operator: samples are only more rows, so they are run as one call.

    ``batched`` are the places of the (rows, …) arguments. Where an argument at ``per_sample`` is on
    (a wanted weight gradient, dropout, whose mask restarts with each sample), or a weight is
    batched, the samples are run one by one.
    """

    def rule(operator: Any, batch_size: int, in_dims: tuple, *args: Any) -> Any:
        others = (d for i, d in enumerate(in_dims) if i not in batched)
        if any(d is not None for d in others) or any(args[i] for i in per_sample if i < len(args)):
            return None
        args = tuple(
            fold(a, in_dims[i], batch_size) if i in batched else a for i, a in enumerate(args)
        )
        return unfold(operator(*args), batch_size)

    vmap_rule(op)(rule)
