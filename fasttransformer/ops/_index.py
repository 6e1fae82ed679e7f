"""Ids are checked before anything is read with them, in eager mode and in compiled graphs alike.

A compiled graph keeps no Python ``if``, and its own look-up wraps negative ids in silence
(pytorch/pytorch#183608). So the check is an operator that returns the ids: a look-up reads what the
check let through, and no optimization can drop the one and keep the other. Plain calls on the CPU
look at the ids in place instead, which takes a tenth of that operator's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Kernel, unavailable

_transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_modes_active = torch._C._len_torch_dispatch_stack

#: The C++ operator that looks; None where there is no C++ library.
_find_outside = None if unavailable("cpu") else torch.ops.fasttransformer.find_outside.default

_LIBRARY = torch.library.Library("fasttransformer", "FRAGMENT")
_LIBRARY.define("checked_index(Tensor index, SymInt size, int? ignore, str what) -> Tensor")


def is_index(op: str, **tensors: Tensor) -> None:
    """TypeError unless each argument is a tensor of integers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be an integer dtype")


def is_index_if_given(op: str, **tensors: Tensor | None) -> None:
    """:func:`is_index` of the arguments that are not None."""
    is_index(op, **{name: tensor for name, tensor in tensors.items() if tensor is not None})


def checked_index(
    op: str, name: str, index: Tensor, size: int | torch.SymInt, ignore: int | None = None
) -> Tensor:
    """``index`` as int64 with every entry known to be in [0, size), or equal to ``ignore``.

    Raises:
        ValueError: an entry is outside. On a GPU, where looking would stop the queue, a device-side
            assertion fails instead, before the ids are used.
    """
    return torch.ops.fasttransformer.checked_index(index, size, ignore, f"{op}: {name}")


def checked_first(
    op: str, name: str, index: Tensor, size: int | torch.SymInt, ignore: int | None = None
) -> Tensor:
    """:func:`checked_index` of ids in the CPU's memory; others as they are: CUDA kernels look at
    each id before they read with it, and for the others :func:`checked_for` follows."""
    if not index.is_cpu:
        return index
    if (
        _find_outside is None
        or type(index) is not Tensor
        or _is_compiling()
        or _transforms_active()
        or _modes_active()
    ):
        return checked_index(op, name, index, size, ignore)
    index = kernel_ids(index)
    at = _find_outside(index, size, ignore)
    if at >= 0:
        raise ValueError(_outside(f"{op}: {name}", int(index.view(-1)[at]), size, ignore))
    return index


def checked_for(
    kernel: Kernel,
    op: str,
    name: str,
    index: Tensor,
    size: int | torch.SymInt,
    ignore: int | None = None,
) -> Tensor:
    """Ids that :func:`checked_first` let pass unseen, for a kernel that does not look at them."""
    if index.is_cpu or kernel.backend == "cuda":
        return index
    return checked_index(op, name, index, size, ignore)


def _outside(what: str, bad: int, size: int | torch.SymInt, ignore: int | None) -> str:
    return f"{what} holds {bad}; {_rule(size, ignore)}"


def _rule(size: int | torch.SymInt, ignore: int | None) -> str:
    return f"it must be in [0, {size})" + ("" if ignore is None else f" or ignore_index {ignore}")


def kernel_ids(index: Tensor) -> Tensor:
    """Ids as operators take them: contiguous, int64 or int32."""
    dtype = index.dtype
    if dtype is not torch.int64 and dtype is not torch.int32:
        index = index.to(torch.int64)
    return index if index.is_contiguous() else index.contiguous()


def _checked_index(index: Tensor, size: int, ignore: int | None, what: str) -> Tensor:
    index = index.to(torch.int64, copy=True)
    outside = (index < 0) | (index >= size)
    if ignore is not None:
        outside &= index != ignore
    if index.device.type != "cpu":
        message = f"{what}: an entry is out of range; {_rule(size, ignore)}"
        torch._assert_async(~outside.any(), message)
    elif outside.any():
        raise ValueError(_outside(what, int(index[outside][0]), size, ignore))
    return index


_LIBRARY.impl("checked_index", _checked_index, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttransformer::checked_index")
def _(index, size, ignore, what):
    return torch.empty_like(index, dtype=torch.int64)


@torch.library.register_vmap("fasttransformer::checked_index")
def _(info, in_dims, index, size, ignore, what):
    return torch.ops.fasttransformer.checked_index(index, size, ignore, what), in_dims[0]
