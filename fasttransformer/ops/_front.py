"""What the fronts of the operations share: checks whose messages name the argument, the value and
the rule; autocast; and how fake kernels and vmap rules are registered for every backend at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import operator_namespaces
from ._derivatives import GRAD_OPTIONS as GRAD_OPTIONS
from ._derivatives import needs_grad as needs_grad

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_float(op: str, **tensors: Tensor) -> None:
    """TypeError unless each argument is a floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; it must be float64, float32, float16 "
                "or bfloat16"
            )


def is_float_if_given(op: str, **tensors: Tensor | None) -> None:
    """:func:`is_float` of the arguments that are not None."""
    is_float(op, **{name: tensor for name, tensor in tensors.items() if tensor is not None})


def same_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """ValueError unless each given tensor lies on ``first``'s device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but the first argument is on {first.device}"
            )


def same_dtype(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """TypeError unless each given tensor has ``first``'s dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}, but the first argument has {first.dtype}"
            )


def alike(
    op: str, names: tuple[str, ...], tensors: tuple[Tensor | None, ...], required: int
) -> None:
    """:func:`is_float`, :func:`same_device` and :func:`same_dtype` of all that are given; the
    first ``required`` must be.

    In one look at each where nothing is wrong; if something is, those three say what.
    """
    first = tensors[0]
    if isinstance(first, Tensor):
        dtype, device = first.dtype, first.device
        if dtype in FLOATS:
            for x in tensors:
                if x is not None and (
                    not isinstance(x, Tensor) or x.dtype != dtype or x.device != device
                ):
                    break
            else:
                for x in tensors[:required]:
                    if x is None:
                        break
                else:
                    return
    named = dict(zip(names, tensors))
    is_float(op, **dict(zip(names[:required], tensors)))  # type: ignore[arg-type]
    is_float_if_given(op, **named)
    same_device(op, first, **named)  # type: ignore[arg-type]
    same_dtype(op, first, **named)  # type: ignore[arg-type]


def probability(op: str, dropout_p: float) -> None:
    number = isinstance(dropout_p, (int, float)) or (  # the former first, for torch.compile
        hasattr(dropout_p, "__float__") and not isinstance(dropout_p, Tensor)
    )
    if not number:
        raise TypeError(f"{op}: dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it must be in [0, 1)")


def positive_eps(op: str, eps: float) -> None:
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps}; it must be a finite number, 0 or more")


def device_type_of(tensor: Tensor) -> str:
    """``tensor.device.type``, which makes two objects at each look, at a sixth of the price."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks of matmul-like operations here, or None when it is off."""
    if autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_enabled(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # "meta" raises


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """A float32 or 16-bit tensor in ``dtype``; float64, like in torch's autocast, stays."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor  # the checks that follow name what is no tensor
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def float32_at_most(tensor: Tensor) -> Tensor:
    """A vector or table beside the input in a dtype that kernels read."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def last_stride_one(x: Tensor) -> Tensor:
    """``x`` as kernels read it; a copy only if need be."""
    return x if x.stride()[-1] == 1 or x.shape[-1] <= 1 else x.contiguous()


def recorded_as_graph() -> bool:
    """Whether the call is recorded to be run again with other numbers: by torch.compile, export,
    make_fx, jit.trace. (Other dispatch modes, which only look on, can't be told from make_fx's.)"""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed drawn from torch's generator of the device: one int64."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake kernel (shapes, strides and dtypes only) for ``op`` on every backend."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in operator_namespaces():
            if hasattr(getattr(torch.ops, namespace), op):
                torch.library.register_fake(f"{namespace}::{op}", function)
        return function

    return register
