"""The element-wise middle of a feed-forward block with dropout, or dropout alone, by a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import STEPS, Kernel, choose
from ..reference.feed_forward import GATES
from ..reference.linear_add import ACTIVATIONS
from ._front import GRAD_OPTIONS, device_type_of, fake, needs_grad, new_seed
from ._function import differentiable, vmap_rule

#: What operators call the activations (csrc/bindings/activation_code.h). Not by name: up to 2.13
#: torch's stable ABI never frees a string, and every call would leak one.
CODES = {name: code for code, name in enumerate(("", *ACTIVATIONS, *GATES))}


def step_of(backend: str, input: Tensor, options: frozenset[str]) -> Kernel | None:
    """The backend's kernel for the activation of ``input``, or None."""
    step = STEPS["activation"].get(backend)
    if step is not None and step.unsupported(input.dtype, options, ()) is not None:
        return None
    return step


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activated(input: Tensor, name: str, dropout_p: float = 0.0) -> Tensor:
    """:func:`activation` by the backend that runs linear layers here, or by torch's operations."""
    options = GRAD_OPTIONS[needs_grad(input)]
    on = choose("linear_add", device_type_of(input), input.dtype, options).backend
    step = step_of(on, input, options)
    if step is not None:
        return activation(input, name, step, dropout_p)
    if name in GATES:
        gate, up = input.chunk(2, dim=-1)
        input = activate(gate, GATES[name]) * up
    elif name:
        input = activate(input, name)
    return F.dropout(input, dropout_p)


def dropout(input: Tensor, dropout_p: float) -> Tensor:
    """``input`` with dropout, whose mask is a function of a fresh seed and the position."""
    if dropout_p == 0.0:
        return input
    return activated(input, "", dropout_p)


def activation(
    input: Tensor, name: str, kernel: Kernel, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    r"""dropout(act(input)), or for a gate dropout(act(gate) · up) of the halves of the last
    dimension; ``name`` may be empty, and a seed is drawn where dropout has none.

    ``input`` is (\*, features) with rows of stride 1: of two dimensions with any row stride, else
    contiguous.
    """
    if input.dim() == 0:
        return activation(input[None], name, kernel, dropout_p, seed)[0]
    if input.stride(-1) != 1 or (input.dim() != 2 and not input.is_contiguous()):
        input = input.contiguous()
    if dropout_p > 0.0 and seed is None:
        seed = new_seed(input.device)
    if needs_grad(input):
        return _activation_with_grad(input, seed, name, dropout_p, kernel)
    return kernel.forward(input, CODES[name], dropout_p, seed)


class _Activation:
    @staticmethod
    def forward(x, seed, name, dropout_p, kernel):
        return kernel.forward(x, CODES[name], dropout_p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seed, ctx.name, ctx.dropout_p, ctx.kernel = inputs
        ctx.save_for_backward(x if ctx.name else None, seed)

    @staticmethod
    def backward(ctx, grad):
        x, seed = ctx.saved_tensors
        grad = grad.contiguous()
        if not ctx.name:  # dropout alone needs the mask only
            d_input = ctx.kernel.forward(grad, CODES[""], ctx.dropout_p, seed)
        else:
            d_input = ctx.kernel.backward(grad, x, CODES[ctx.name], ctx.dropout_p, seed)
        return d_input, None, None, None, None


_activation_with_grad = differentiable(_Activation, tensors=2)


def _features(input: Tensor, code: int):
    return input.shape[-1] // 2 if code >= CODES["swiglu"] else input.shape[-1]


@fake("activation")
def _(input, activation, dropout_p=0.0, seed=None):
    return input.new_empty((*input.shape[:-1], _features(input, activation)))


@fake("activation_backward")
def _(grad, input, activation, dropout_p=0.0, seed=None):
    return input.new_empty(input.shape)


@vmap_rule("activation")
def _(operator, batch_size, in_dims, input, activation, dropout_p=0.0, seed=None):
    if seed is not None:  # the mask restarts with each sample
        return None
    return operator(input.movedim(in_dims[0], 0).contiguous(), activation, dropout_p, None), 0


@vmap_rule("activation_backward")
def _(operator, batch_size, in_dims, grad, input, activation, dropout_p=0.0, seed=None):
    if None in in_dims[:2] or seed is not None:
        return None
    grad, input = (t.movedim(d, 0).contiguous() for t, d in zip((grad, input), in_dims))
    return operator(grad, input, activation, dropout_p, None), 0
