"""Ids are checked before anything is read with them, in eager mode and in compiled graphs alike.

A compiled graph keeps no Python ``if``, and its own look-up wraps negative ids in silence
(pytorch/pytorch#183608). So the check is an operator that returns the ids: a look-up reads what the
check let through, and no optimization can drop the one and keep the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fasttransformer", "FRAGMENT")
_LIBRARY.define("checked_index(Tensor index, SymInt size, int? ignore, str what) -> Tensor")


def is_index(op: str, **tensors: Tensor | None) -> None:
    """TypeError unless each given argument is a tensor of integers."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be an integer dtype")


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
    """:func:`checked_index` of ids in the CPU's memory; others as they are: a GPU's kernels look at
    each id before they read with it, and where the reference runs, it comes with the operator."""
    if index.device.type != "cpu":
        return index
    return checked_index(op, name, index, size, ignore)


def kernel_ids(index: Tensor) -> Tensor:
    """Ids as operators take them: contiguous, int64 or int32."""
    if index.dtype not in (torch.int64, torch.int32):
        index = index.to(torch.int64)
    return index.contiguous()


def _checked_index(index: Tensor, size: int, ignore: int | None, what: str) -> Tensor:
    index = index.to(torch.int64, copy=True)
    outside = (index < 0) | (index >= size)
    if ignore is not None:
        outside &= index != ignore
    rule = f"it must be in [0, {size})" + ("" if ignore is None else f" or ignore_index {ignore}")
    if index.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{what}: an entry is out of range; {rule}")
    elif outside.any():
        raise ValueError(f"{what} holds {int(index[outside][0])}; {rule}")
    return index


_LIBRARY.impl("checked_index", _checked_index, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttransformer::checked_index")
def _(index, size, ignore, what):
    return torch.empty_like(index, dtype=torch.int64)


@torch.library.register_vmap("fasttransformer::checked_index")
def _(info, in_dims, index, size, ignore, what):
    return torch.ops.fasttransformer.checked_index(index, size, ignore, what), in_dims[0]
