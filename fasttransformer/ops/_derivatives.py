"""Which derivatives of a call are wanted: none, a gradient, or more than kernels have.

A kernel comes with its gradient and nothing else. A derivative in forward mode
(:func:`torch.func.jvp`, ``jacfwd``, ``forward_ad.dual_level``) and a gradient of a gradient are
taken of the reference, which is plain PyTorch: no kernel can carry them, and an operator that knows
nothing of them would drop them without a word.

torch.func wraps a tensor once for each transform that it has passed into. A wrapper of ``vmap``
says nothing of the gradient that is wanted of what is inside, so each level is looked at.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling

#: What :func:`needs_grad` answers, next to False and True: more than a gradient.
SECOND = 2
FORWARD = 3
#: needs_grad's answer → the options of an operation that has no others.
GRAD_OPTIONS = (
    frozenset[str](),
    frozenset({"grad"}),
    frozenset({"grad", "second_derivative"}),
    frozenset({"grad", "forward_mode"}),
)

_PLAIN = -1  # the level of tensors that torch.func does not wrap
_GRAD, _JVP = _functorch.TransformType.Grad, _functorch.TransformType.Jvp


def needs_grad(*tensors: Tensor | None) -> int:
    """False, True, or where no kernel can do what is wanted ``SECOND`` or ``FORWARD``."""
    if forward_ad._current_level >= 0 or transforms_active():
        return _within_transforms(tensors)
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _within_transforms(tensors: Iterable[Tensor | None]) -> int:
    if _is_compiling():
        return _while_compiling(tensors)
    levels = wanted_levels(tensors)
    if levels is None:
        return FORWARD
    return len(levels) == 1 if len(levels) < 2 else SECOND


def _while_compiling(tensors: Iterable[Tensor | None]) -> int:
    """torch.compile can't trace a look at the wrappers. It fuses the reference's operations."""
    if transforms_active():
        return SECOND
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            return FORWARD
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def wanted_levels(tensors: Iterable[Tensor | None]) -> set[int] | None:
    """The levels of torch.func's transforms (−1: autograd itself) at which one of the tensors
    requires a gradient; None where one has a tangent of forward mode."""
    recording: dict[int, bool] = {}
    forward = set()
    enabled = torch.is_grad_enabled()
    for interpreter in reversed(_functorch.get_interpreter_stack() or ()):
        if interpreter.key() == _GRAD:
            recording[interpreter.level()] = enabled
            # What lies outside of a transform keeps to the no_grad around that transform.
            enabled = enabled and _functorch.CGradInterpreterPtr(interpreter).prevGradMode()
        elif interpreter.key() == _JVP:
            forward.add(interpreter.level())
    recording[_PLAIN] = enabled
    found = set()
    for tensor in tensors:
        for level, inner in _unwrapped(tensor):
            if level in forward:
                return None
            if recording.get(level) and inner.requires_grad:
                found.add(level)
            if level == _PLAIN and forward_ad._current_level >= 0 and _has_tangent(inner):
                return None
    return found


def recorded(tensors: Iterable[Any]) -> list[Tensor]:
    """The tensors that autograd records, at any level, without the wrappers around that level's."""
    found: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            layers = (inner for _, inner in _unwrapped(tensor) if inner.requires_grad)
            found += itertools.islice(layers, 1)
    return found


def many_cotangents(*grads: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad(..., is_grads_batched=True)`` runs a backward pass. Its vmap is
    an older one than torch.func's: it knows no rules of our operators, and runs each one in turn
    for every cotangent, if its arguments let it."""
    if _is_compiling():
        return False
    return any(g is not None and _functorch.is_legacy_batchedtensor(g) for g in grads)


def level_of(tensor: Tensor) -> int:
    """The transform that wraps ``tensor``: −1 for none, −2 for one that has ended."""
    return _functorch.maybe_get_level(tensor)


def _unwrapped(tensor: Tensor | None) -> Iterable[tuple[int, Tensor]]:
    """(level, tensor) from the outermost wrapper to the tensor itself."""
    while tensor is not None:
        yield _functorch.maybe_get_level(tensor), tensor
        wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
        tensor = _functorch.get_unwrapped(tensor) if wrapped else None


def _has_tangent(tensor: Tensor) -> bool:
    with temporarily_clear_interpreter_stack():  # a transform would show its own level's tangent
        return forward_ad.unpack_dual(tensor).tangent is not None


@contextlib.contextmanager
def lasting() -> Iterator[bool]:
    """Tensors made within can be used by any later call, whatever mode that is in; unless the
    block is told that they can't: those of a transform or a tracer are of no use after it."""
    with torch.inference_mode(False), torch.no_grad():
        yield not (transforms_active() or torch._C._len_torch_dispatch_stack())


def with_gradient(*names: str) -> dict[tuple[Any, ...], frozenset[str]]:
    """(needs_grad's answer, a flag for each name) → the names in use with GRAD_OPTIONS'."""
    table: dict[tuple[Any, ...], frozenset[str]]
    table = {(order,): options for order, options in enumerate(GRAD_OPTIONS)}
    for name in names:
        table = {
            (*flags, used): options | {name} if used else options
            for flags, options in table.items()
            for used in (False, True)
        }
    return table
