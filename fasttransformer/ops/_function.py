"""How forward and backward operators are joined: for autograd on the plain path, for torch.func's
transforms (grad, vmap, jacrev) when one is active, and vmap rules of the operators themselves.

torch has two forms of autograd.Function. The one with ``setup_context`` can be transformed, but
its ``apply`` binds a signature at each call (15 µs); the one whose ``forward`` takes ``ctx`` can't
be transformed and costs 4 µs. An operation is written once, in the first form;
:func:`differentiable` derives the second and picks at call time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import operator_namespaces

_transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


def _unwrapping() -> Callable[[Tensor], Tensor] | None:
    """What Function.apply does to its tensors outside of transforms, if this torch is one whose
    Function.apply was read (2.13), and so may be passed by; None: it is called like anywhere."""
    known = torch.__version__.startswith("2.13.") and "apply" in vars(torch._C._FunctionBase)
    return getattr(torch._C._functorch, "unwrap_if_dead", None) if known else None


_unwrap_if_dead = _unwrapping()


def differentiable(form: type, tensors: int, outputs: int | None = None) -> Callable[..., Any]:
    """The function that runs ``form`` (``forward(*args)``, ``setup_context(ctx, inputs, output)``
    and ``backward(ctx, *grads)`` as static methods) with a gradient; returns what forward does.

    The first ``tensors`` arguments are tensors or None; none that needs a gradient comes later.

    With ``outputs``, only the first so many of forward's outputs are returned and have a gradient;
    the others are kept for the backward pass. torch.func needs them as outputs all the same, the
    plain path is spared the wrapping (1 µs each).

    Second derivatives are refused with torch's own message.
    """
    run, setup = form.forward, form.setup_context  # type: ignore[attr-defined]
    grads_of = form.backward  # type: ignore[attr-defined]

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup(ctx, args, output)
        if outputs is None:
            return output
        return output[0] if outputs == 1 else output[:outputs]

    def setup_transformed(ctx: Any, inputs: tuple, output: Any) -> None:
        setup(ctx, inputs, output)
        if outputs is not None:
            ctx.mark_non_differentiable(*output[outputs:])

    def backward_transformed(ctx: Any, *grads: Any) -> Any:
        return grads_of(ctx, *grads[:outputs])

    plain = type(
        form.__name__,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(_once_differentiable(grads_of)),
            "__doc__": form.__doc__,
        },
    )
    transformed = type(
        f"{form.__name__}Transformed",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "setup_context": staticmethod(setup_transformed),
            "backward": staticmethod(once_differentiable(backward_transformed)),
            "generate_vmap_rule": True,
            "__doc__": form.__doc__,
        },
    )
    apply_plain: Callable[..., Any] = plain.apply  # type: ignore[attr-defined]
    apply_transformed: Callable[..., Any] = transformed.apply  # type: ignore[attr-defined]
    # What Function.apply ends in. It is written in Python, and on the plain path 1.4 µs of it only
    # find out that there is nothing to do but unwrap tensors that outlived a torch.func transform.
    apply_directly: Callable[..., Any] = super(torch.autograd.Function, plain).apply  # type: ignore
    unwrap = _unwrap_if_dead

    def apply(*args: Any) -> Any:
        if _transforms_active():
            output = apply_transformed(*args)
            if outputs is None:
                return output
            return output[0] if outputs == 1 else output[:outputs]
        if unwrap is None or _is_compiling():  # torch.compile knows Function.apply only
            return apply_plain(*args)
        given = [x if x is None else unwrap(x) for x in args[:tensors]]
        return apply_directly(*given, *args[tensors:])

    return apply


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's ``once_differentiable``, entered only where a second derivative could be asked for:
    it switches gradients off and on again (1.5 µs), and an ordinary backward has them off."""
    refusing = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def vmap_rule(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers ``rule(operator, batch_size, in_dims, *args) -> (outputs, out_dims) or None`` as
    the vmap rule of ``op`` on every backend; None means that the samples are run one by one."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in operator_namespaces():
            packet = getattr(getattr(torch.ops, namespace), op, None)
            if packet is None:
                continue

            def both(info, in_dims, *args, _operator=packet.default):
                found = rule(_operator, info.batch_size, in_dims, *args)
                return found or one_by_one(_operator, info.batch_size, in_dims, *args)

            torch.library.register_vmap(f"{namespace}::{op}", both)
        return rule

    return register


def one_by_one(operator: Any, batch_size: int, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """Runs ``operator`` on each sample and stacks the results."""
    samples = [
        operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
        for i in range(batch_size)
    ]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return tuple(torch.stack(part) for part in zip(*samples)), (0,) * len(samples[0])


def fold(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    """(rows, …) batched in ``dim``, or not batched, as (batch_size * rows, …), with last stride 1
    and, of more than two dimensions, contiguous."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    folded = tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
    return folded if folded.dim() <= 2 and folded.stride(-1) == 1 else folded.contiguous()


def unfold(outputs: tuple[Tensor, ...], batch_size: int) -> tuple[tuple[Tensor, ...], tuple]:
    """The way back from :func:`fold` for each output of an operator."""
    parts = tuple(o.reshape(batch_size, o.shape[0] // batch_size, *o.shape[1:]) for o in outputs)
    return parts, (0,) * len(parts)
