"""The element-wise middle of a feed-forward block by a kernel of its own, with its gradient."""

from __future__ import annotations

from torch import Tensor

from ..backends import STEPS, Kernel, choose
from ..reference.feed_forward import GATES
from ._front import device_type_of, fake, needs_grad
from ._function import differentiable, vmap_rule
from ._norm import GRAD, NO_OPTIONS
from .linear_add import activate


def step_of(backend: str, input: Tensor, options: frozenset[str]) -> Kernel | None:
    """The backend's kernel for the activation of ``input``, or None."""
    step = STEPS["activation"].get(backend)
    if step is not None and step.unsupported(input.dtype, options, ()) is not None:
        return None
    return step


def activated(input: Tensor, name: str) -> Tensor:
    """:func:`activation` by the backend that runs linear layers here, or by torch's operations."""
    options = GRAD if needs_grad(input) else NO_OPTIONS
    on = choose("linear_add", device_type_of(input), input.dtype, options).backend
    step = step_of(on, input, options)
    if step is not None:
        return activation(input, name, step)
    if name in GATES:
        gate, up = input.chunk(2, dim=-1)
        return activate(gate, GATES[name]) * up
    return activate(input, name)


def activation(input: Tensor, name: str, kernel: Kernel) -> Tensor:
    r"""act(input), or for a gate act(gate) · up of the halves of the last dimension, rounded once.

    ``input`` is (\*, features) with rows of stride 1: of two dimensions with any row stride, else
    contiguous.
    """
    if input.stride(-1) != 1 or (input.dim() != 2 and not input.is_contiguous()):
        input = input.contiguous()
    if needs_grad(input):
        return _activation_with_grad(input, name, kernel)
    return kernel.forward(input, name)


class _Activation:
    @staticmethod
    def forward(x, name, kernel):
        return kernel.forward(x, name)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.kernel = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return ctx.kernel.backward(grad.contiguous(), x, ctx.name), None, None


_activation_with_grad = differentiable(_Activation, tensors=1)


def _features(input: Tensor, name: str):
    return input.shape[-1] // 2 if name in GATES else input.shape[-1]


@fake("activation")
def _(input, activation):
    return input.new_empty((*input.shape[:-1], _features(input, activation)))


@fake("activation_backward")
def _(grad, input, activation):
    return input.new_empty(input.shape)


@vmap_rule("activation")
def _(operator, batch_size, in_dims, input, activation):
    return operator(input.movedim(in_dims[0], 0).contiguous(), activation), 0


@vmap_rule("activation_backward")
def _(operator, batch_size, in_dims, grad, input, activation):
    if None in in_dims[:2]:
        return None
    grad, input = (t.movedim(d, 0).contiguous() for t, d in zip((grad, input), in_dims))
    return operator(grad, input, activation), 0
