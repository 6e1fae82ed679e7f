"""Lets a test that makes CPU tensors run the kernels of a real GPU.

Tests make their inputs on the CPU, for every backend alike. On a machine with a GPU this module
stands between: its operators take CPU tensors, copy each to the GPU as it lies (same storage size,
offset and strides, so that a test of a layout tests that layout there), call the backend's operator
and copy back what it returned or wrote. Tensors that are on the GPU already go straight through.
:func:`running` puts these operators into the backends' table for CPU tensors.

The device and the operators below are arguments, so that the copying is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fasttransformer.backends import COMPOSED, STEPS, TABLE, override, use_backend


def moved(x: Any, device: str, known: dict[int, Tensor]) -> Any:
    """``x`` on ``device`` as it lies: tensors that share a storage share one there too."""
    if isinstance(x, (list, tuple)):
        return [moved(item, device, known) for item in x]
    if not isinstance(x, Tensor) or (x.device.type != "cpu" and device != "cpu"):
        return x
    storage = x.untyped_storage()
    at = storage.data_ptr() if storage.nbytes() else id(storage)
    if at not in known:
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        known[at] = flat.to(device, copy=True)
    there = torch.empty(0, dtype=x.dtype, device=device)
    return there.set_(known[at].untyped_storage(), x.storage_offset(), x.size(), x.stride())


def bridge(operator: Any, device: str) -> Callable[..., Any]:
    """``operator`` for CPU tensors, carried out on ``device``."""
    schema = operator._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]

    def call(*args: Any) -> Any:
        known: dict[int, Tensor] = {}
        there = [moved(x, device, known) for x in args]
        result = operator(*there)
        for i in written:
            args[i].copy_(there[i])
        if isinstance(result, Tensor):
            return result.cpu()
        return tuple(x.cpu() if isinstance(x, Tensor) else x for x in result)

    return call


def bridged_namespace(backend: str, namespace: str) -> str:
    return f"{namespace}_card_{backend}"


@functools.cache
def operators(backend: str, namespace: str, device: str) -> torch.library.Library:
    """Defines the bridged operators of a namespace, in one of their own."""
    library = torch.library.Library(bridged_namespace(backend, namespace), "DEF")
    ours = {f"{op}{part}" for op in (*TABLE, *STEPS) for part in ("", "_backward")}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        space, _, op = name.partition("::")
        if space != namespace or op not in ours:
            continue
        operator = getattr(getattr(torch.ops, namespace), op).default
        library.define(str(operator._schema).removeprefix(f"{namespace}::"))
        library.impl(op, bridge(operator, device), "CPU")
        if device != "cpu":
            library.impl(op, operator, torch.device(device).type.upper())
        library.impl(op, operator, "Meta")  # fake kernels are the backend's own
    return library


#: ``--rehearse-card``: what runs in simt goes by way of this module, as it would on a GPU.
REHEARSED = False


def rehearsed() -> contextlib.AbstractContextManager[None]:
    """:func:`running` with simt's operators in a GPU's place; within ``simt.running()``."""
    return running("cuda", "fasttransformer_simt", "cpu")


@contextlib.contextmanager
def running(backend: str, namespace: str, device: str) -> Iterator[None]:
    """Within it ``backend`` is forced, and runs on CPU tensors by way of ``device``."""
    operators(backend, namespace, device)
    space = getattr(torch.ops, bridged_namespace(backend, namespace))

    def bridged(kernel: Any) -> Any:
        parts = {
            part: getattr(space, getattr(kernel, part)._schema.name.partition("::")[2]).default
            for part in ("forward", "backward")
            if getattr(kernel, part) is not None
        }
        return dataclasses.replace(kernel, **parts)

    rows = {
        op: bridged(row[backend])
        for op, row in (*TABLE.items(), *STEPS.items())
        if backend in row and op not in COMPOSED and row[backend].forward is not None
    }
    with override(backend, rows, device_type="cpu"), use_backend(backend):
        yield
