"""Position-wise feed-forward block: two calls of linear_add, so it runs where linear_add does.

With a gradient, what the activation makes is not kept but made again in the backward pass, so that
a block keeps one number per hidden value instead of two.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ..reference.feed_forward import GATES
from ._activation import CODES, activate, step_of
from ._activation import activation as _activation
from ._front import (
    GRAD_OPTIONS,
    is_float,
    is_float_if_given,
    needs_grad,
    new_seed,
    probability,
    same_device,
    same_dtype,
)
from ._function import differentiable
from .linear_add import (
    ACTIVATIONS,
    autocast_linear,
    kernel_inputs,
    linear_add,
    linear_gradients,
    operands_to_keep,
    viewed,
)


def feed_forward(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Two linear layers with an activation, gated or not, and dropout between them.

    .. math:: Y = D(\phi(X W_1^\top + b_1))\, W_2^\top + b_2 \qquad\text{or, gated,}\qquad
        Y = D(\phi(G) \odot U)\, W_2^\top + b_2, \quad [G, U] = X W_1^\top + b_1

    Args:
        input: (\*, in_features).
        weight_in: (hidden, in_features), or (2 · hidden, in_features) with the gate's rows first
            for ``"swiglu"`` and ``"geglu"``.
        bias_in: (hidden,) or (2 · hidden,), or ``None``.
        weight_out: (out_features, hidden).
        bias_out: (out_features,), or ``None``.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``; or gated:
            ``"swiglu"`` (φ = silu), ``"geglu"`` (φ = gelu).
        dropout_p: probability with which dropout D drops a hidden value, in [0, 1); always applied,
            as by a functional dropout with ``training=True``. The mask is a function of a seed,
            drawn from torch's generator, and the position: equal on every backend.
        backend: forces one backend for this call.

    Returns:
        (\*, out_features) in ``input``'s dtype. Sums are float32 for 16-bit types; kernels round
        the hidden values to the input's dtype. Under autocast the inputs are cast to its dtype, as
        for :func:`torch.nn.functional.linear`.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes that don't fit, an unknown activation, dropout_p outside [0, 1).

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.3; gates: Shazeer, GLU Variants
    Improve Transformer, 2020 (arXiv:2002.05202).

    >>> import torch, fasttransformer as ft
    >>> one = torch.ones(1, 1)
    >>> ft.feed_forward(torch.tensor([[-1.0], [2.0]]), one, None, 3 * one, None, activation="relu")
    tensor([[0.],
            [6.]])
    """
    op = "feed_forward"
    input, weight_in, bias_in, weight_out, bias_out = autocast_linear(
        input, weight_in, bias_in, weight_out, bias_out
    )
    _check(op, input, weight_in, bias_in, weight_out, bias_out, activation)
    probability(op, dropout_p)
    options = GRAD_OPTIONS[needs_grad(input, weight_in, bias_in, weight_out, bias_out)]
    kernel = choose(op, input.device.type, input.dtype, options, (), backend)
    step = None if kernel.forward is None else step_of(kernel.backend, input, options)
    on = kernel.backend
    if kernel.forward is not None and activation not in GATES and not (step and options):
        hidden = linear_add(
            input, weight_in, bias_in, activation=activation, dropout_p=dropout_p, backend=on
        )
        return linear_add(hidden, weight_out, bias_out, backend=on)
    seed = new_seed(input.device) if dropout_p > 0.0 else None
    if kernel.forward is None:
        return reference.feed_forward(
            input, weight_in, bias_in, weight_out, bias_out, activation=activation,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    if step is not None and options:
        return _with_grad(
            input, weight_in, bias_in, weight_out, bias_out, seed, activation, dropout_p,
            (kernel, step),
        )  # fmt: skip
    inner = linear_add(input, weight_in, bias_in, backend=on)
    if step is not None:
        hidden = _activation(inner, activation, step, dropout_p, seed)
    else:
        gate, up = inner.chunk(2, dim=-1)
        hidden = F.dropout(activate(gate, GATES[activation]) * up, dropout_p)
    return linear_add(hidden, weight_out, bias_out, backend=on)


def _with_grad(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    kernels: tuple[Kernel, Kernel],
) -> Tensor:
    lead = tuple(input.shape[:-1])
    x, weight_in, bias_in, _ = kernel_inputs(
        input, weight_in, bias_in, None, (*lead, weight_in.shape[0])
    )
    if bias_out is not None:
        bias_out = bias_out.contiguous()
    out = _feed_forward_with_grad(
        x, weight_in, bias_in, weight_out.contiguous(), bias_out, seed, activation, dropout_p,
        kernels,
    )  # fmt: skip
    return viewed(out, (*lead, weight_out.shape[0]))


class _FeedForward:
    @staticmethod
    def forward(x, weight_in, bias_in, weight_out, bias_out, seed, activation, dropout_p, kernels):
        linear, step = kernels
        inner = linear.forward(x, weight_in, bias_in, None, CODES[""])
        hidden = step.forward(inner, CODES[activation], dropout_p, seed)
        return linear.forward(hidden, weight_out, bias_out, None, CODES[""]), inner

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight_in, _, weight_out, _, seed, activation, dropout_p, ctx.kernels = inputs
        ctx.how, needs = (CODES[activation], dropout_p), ctx.needs_input_grad
        ctx.shapes = (x.shape, weight_in.shape), (output[1].shape, weight_out.shape)
        first = needs[0] or needs[1] or needs[2]
        ctx.save_for_backward(
            *operands_to_keep(x, weight_in, needs),
            weight_out if first else None,
            output[1] if first or needs[3] else None,
            seed,
        )

    @staticmethod
    def backward(ctx, grad):
        x, weight_in, weight_out, inner, seed = ctx.saved_tensors
        linear, step = ctx.kernels
        needs = ctx.needs_input_grad
        first = needs[0] or needs[1] or needs[2]
        hidden = step.forward(inner, *ctx.how, seed) if needs[3] else None
        hidden_shape = (*ctx.shapes[1][0][:-1], ctx.shapes[1][1][1])
        d_hidden, *second = linear_gradients(
            linear, grad, hidden, weight_out, (first, needs[3], needs[4]),
            (hidden_shape, ctx.shapes[1][1]),
        )  # fmt: skip
        del hidden
        if not first:
            return None, None, None, *second, *(None,) * 4
        d_inner = step.backward(d_hidden, inner, *ctx.how, seed)
        inputs = linear_gradients(linear, d_inner, x, weight_in, needs, ctx.shapes[0])
        return *inputs, *second, *(None,) * 4


_feed_forward_with_grad = differentiable(_FeedForward, tensors=6, outputs=1)


def _check(
    op: str,
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    activation: str,
) -> None:
    tensors: dict[str, Tensor | None] = {
        "weight_in": weight_in,
        "bias_in": bias_in,
        "weight_out": weight_out,
        "bias_out": bias_out,
    }
    is_float(op, input=input, weight_in=weight_in, weight_out=weight_out)
    is_float_if_given(op, **tensors)
    same_device(op, input, **tensors)
    same_dtype(op, input, **tensors)
    gated = activation in GATES
    if not gated and activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}; it must be one of "
            f"{', '.join((*ACTIVATIONS, *GATES))}"
        )
    for name, matrix in (("weight_in", weight_in), ("weight_out", weight_out)):
        if matrix.dim() != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(matrix.shape)}; it must be "
                "(out_features, in_features)"
            )
    if input.dim() == 0 or input.shape[-1] != weight_in.shape[1]:
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}; weight_in makes its last "
            f"dimension {weight_in.shape[1]}"
        )
    width = weight_in.shape[0]
    if gated and width % 2:
        raise ValueError(
            f"{op}: weight_in has {width} rows; {activation} needs an even number, the "
            "gate's and the other half"
        )
    hidden = width // 2 if gated else width
    if weight_out.shape[1] != hidden:
        raise ValueError(
            f"{op}: weight_out has in_features {weight_out.shape[1]}; weight_in and "
            f"{activation} make it {hidden}"
        )
    for name, size in (("bias_in", width), ("bias_out", weight_out.shape[0])):
        vector = tensors[name]
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; it must be ({size},)")
