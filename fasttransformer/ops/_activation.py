"""The element-wise middle of a feed-forward block by a kernel of its own, with its gradient."""

from __future__ import annotations

from torch import Tensor

from ..backends import Kernel
from ..reference.feed_forward import GATES
from ._front import fake, needs_grad
from ._function import differentiable, vmap_rule


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
