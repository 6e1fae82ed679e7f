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
from torch.autograd import forward_ad

from ..backends import operator_namespaces
from ._derivatives import level_of, recorded, transforms_active, wanted_levels

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

    What no kernel can do, a derivative of the gradient, raises NotImplementedError.
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
        ctx.recorded = recorded(inputs)
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
            "backward": staticmethod(_once_differentiable(backward_transformed)),
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
        if transforms_active():
            output = apply_transformed(*args)
            if outputs is None:
                return output
            return output[0] if outputs == 1 else output[:outputs]
        if _is_compiling():  # torch.compile knows Function.apply only
            return apply_plain(*_told_apart(args))
        if unwrap is None:
            return apply_plain(*args)
        given = [x if x is None else unwrap(x) for x in args[:tensors]]
        return apply_directly(*given, *args[tensors:])

    return apply


def _told_apart(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, a tensor that is among them twice as a view of itself the second time:
    torch.compile stops at an autograd.Function with one tensor in two places."""
    given: list[Any] = []
    for x in args:
        again = isinstance(x, Tensor) and any(x is other for other in given)
        given.append(x.view_as(x) if again else x)
    return given


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward``, whose results refuse to be differentiated. An ordinary backward pass, which
    can't be asked for that, is passed straight on to it."""

    def run(ctx: Any, *grads: Any) -> Any:
        plain = not (
            torch.is_grad_enabled() or forward_ad._current_level >= 0 or transforms_active()
        )
        if plain or _is_compiling():  # torch.compile has a refusal of its own
            return backward(ctx, *grads)
        return _guarded(backward, ctx, grads)

    return run


def _guarded(backward: Callable[..., Any], ctx: Any, grads: tuple[Any, ...]) -> Any:
    """The gradients by ``backward``, where someone might want a derivative of them."""
    leaves = getattr(ctx, "recorded", ())
    own = level_of(leaves[0]) if leaves else -1
    wanted = wanted_levels(x for x in grads if isinstance(x, Tensor))
    # torch.func records the gradients wherever it records this node, though hardly anyone
    # differentiates them there; whoever else records them has come to do just that. So has
    # whoever asks autograd itself to (create_graph=True).
    if wanted is None or wanted - {own} or (own == -1 and torch.is_grad_enabled()):
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)
    with torch.no_grad():
        gradients = backward(ctx, *grads)
    if not torch.is_grad_enabled():
        return gradients
    alone = isinstance(gradients, Tensor)
    given = (gradients,) if alone else gradients
    kept = iter(_Refusing.apply(len(leaves), *leaves, *(x for x in given if x is not None)))
    given = tuple(x if x is None else next(kept) for x in given)
    return given[0] if alone else given


_NO_SECOND_DERIVATIVE = (
    "a derivative of a gradient is wanted, which kernels don't have. The reference has every "
    'derivative: call the operation with backend="torch", or the model within '
    'fasttransformer.use_backend("torch")'
)


class _Refusing(torch.autograd.Function):
    """Tensors as they are; but whoever differentiates them with respect to one of the ``leaves``
    is told that it can't be done. (torch's ``once_differentiable`` says nothing where the gradient
    of a loss is constant, or where only some inputs are asked for: the derivative is then 0.)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(leaves, *tensors):
        return tuple(x.view_as(x) for x in tensors[leaves:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


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
