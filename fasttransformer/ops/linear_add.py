"""Linear layer: bias, activation, dropout and residual while the product is still in registers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import STEPS, Kernel, choose
from ._activation import CODES
from ._activation import activation as _activation
from ._front import (
    alike,
    autocast_dtype,
    cast,
    device_type_of,
    fake,
    last_stride_one,
    needs_grad,
    new_seed,
)
from ._function import differentiable, fold, vmap_rule
from ._norm import add_options, fold_rows, rows_of

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_NAMES = ("input", "weight", "bias", "residual")


def linear_add(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""``dropout(activation(input @ weight.T + bias)) + residual`` in one kernel.

    .. math:: Y = \operatorname{dropout}(\phi(X W^\top + b)) + R

    Args:
        input: (\*, in_features), or attention's own output (batch, heads, q_len, head_dim) with
            ``heads * head_dim == in_features``: the heads are then read in place, as if they had
            been transposed and joined to (batch, q_len, in_features).
        weight: (out_features, in_features), as in :class:`torch.nn.Linear`.
        bias: (out_features,).
        residual: broadcasts to the output's shape (\*, out_features).
        activation: ``None``, ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"silu"``.
        dropout_p: probability with which a value is dropped before the residual is added, in
            [0, 1); always applied, as by a functional dropout with ``training=True``. The mask is a
            function of a seed, drawn from torch's generator, and the value's place in the output:
            equal on every backend.
        backend: forces one backend for this call.

    Returns:
        (\*, out_features) in ``input``'s dtype; sums are float32 for 16-bit types. Under autocast
        the inputs are cast to its dtype, as for :func:`torch.nn.functional.linear`.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes that don't fit, an unknown activation, dropout_p outside [0, 1).

    >>> import torch, fasttransformer as ft
    >>> ft.linear_add(torch.ones(2, 3), torch.ones(1, 3), residual=torch.ones(2, 1))
    tensor([[4.],
            [4.]])
    """
    op = "linear_add"
    input, weight, bias, residual = autocast_linear(input, weight, bias, residual)
    out_shape = check_linear(op, input, weight, bias, residual)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}; it must be None or one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    grad = needs_grad(input, weight, bias, residual)
    options = add_options(op, grad, dropout_p)
    kernel = choose(op, device_type_of(input), input.dtype, options, (), backend)
    dropout = drawn_dropout(dropout_p, input)
    if kernel.forward is None:
        return reference.linear_add(input, weight, bias, residual, activation, *dropout)
    x, weight, bias, rows = kernel_inputs(input, weight, bias, residual, out_shape)
    if not grad:
        out = kernel.forward(x, weight, bias, rows, CODES[activation or ""], *dropout)
    elif activation is None:
        out = _linear_add(x, weight, bias, rows, *(dropout[::-1] or (None, 0.0)), kernel)
    else:  # the activation's derivative needs its input, so it is kept and not fused
        out = _linear_add(x, weight, bias, None, None, 0.0, kernel)
        out = _activation(out, activation, STEPS["activation"][kernel.backend], *dropout)
        out = out if rows is None else out + rows
    return viewed(out, out_shape)


def drawn_dropout(dropout_p: float, input: Tensor) -> tuple[()] | tuple[float, Tensor]:
    """(dropout_p, a fresh seed), the last arguments of operators; nothing where there is none."""
    if dropout_p == 0.0:
        return ()
    return dropout_p, new_seed(input.device)


def viewed(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An operator's output in the shape that is returned; it has that already or is 2-D."""
    return out if out.dim() == len(shape) else out.view(shape)


def autocast_linear(input: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments in autocast's dtype, where autocast is on."""
    dtype = autocast_dtype(device_type_of(input)) if isinstance(input, Tensor) else None
    if dtype is None:
        return (input, *tensors)
    return tuple(cast(t, dtype) for t in (input, *tensors))


def check_linear(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[int, ...]:
    """Raises unless the arguments fit; returns the output's shape."""
    alike(op, _NAMES, (input, weight, bias, residual), 2)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight has {weight.dim()} dimensions; it must be (out_features, in_features)"
        )
    shape = input.shape
    rank = len(shape)
    if rank == 0:
        raise ValueError(f"{op}: input has no dimensions; it must be (*, in_features)")
    out_features, in_features = weight.shape
    # One head reads either way, and no features do: a residual of three dimensions asks for heads.
    either = rank == 4 and (shape[1] == 1 or in_features == 0)
    joined = either and residual is not None and residual.dim() == 3
    if shape[-1] == in_features and not joined:
        out_shape: tuple[int, ...] = (*shape[:-1], out_features)
    elif rank == 4 and shape[1] * shape[3] == in_features:
        out_shape = (shape[0], shape[2], out_features)
    else:
        raise ValueError(
            f"{op}: input of shape {tuple(shape)} does not fit weight's in_features "
            f"{in_features}: its last dimension must be {in_features}, or it must be "
            "(batch, heads, q_len, head_dim) with heads * head_dim equal to that"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}; weight's out_features make it "
            f"({out_features},)"
        )
    if residual is not None and residual.shape != out_shape:
        try:
            broadcasts = torch.broadcast_shapes(residual.shape, out_shape) == out_shape
        except RuntimeError:
            broadcasts = False
        if not broadcasts:
            raise ValueError(
                f"{op}: residual of shape {tuple(residual.shape)} does not broadcast "
                f"to the output's shape {out_shape}"
            )
    return out_shape


def kernel_inputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(input, weight, bias, residual) as operators take them: weight and bias contiguous, the
    others rows of two dimensions, or of three where input and residual are contiguous and the
    output then has its shape without a view (1 µs)."""
    in_features, rows = weight.shape[1], math.prod(out_shape[:-1])
    if residual is not None and residual.shape != out_shape:
        residual = residual.expand(out_shape)
    three = len(out_shape) == 3 and (residual is None or residual.is_contiguous())
    if input.shape[-1] == in_features:
        if input.dim() == 2 or (three and input.dim() == 3):
            x = rows_of(input, weight.shape[1:])
        else:
            x = last_stride_one(input.reshape(rows, in_features))
    else:  # (batch, heads, q_len, head_dim)
        x = input.transpose(1, 2)
        if x.is_contiguous():  # as attention leaves it: the heads are already joined
            x = x.reshape(*(out_shape[:2] if three else (rows,)), in_features)
        else:
            x = input if input.stride(3) == 1 else input.contiguous()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None:
        if x.dim() != 2:
            residual = residual.contiguous()
        elif residual.dim() != 2 or residual.stride(1) != 1:
            residual = last_stride_one(residual.reshape(rows, out_shape[-1]))
    return x, weight, bias, residual


class _LinearAdd:
    """``input @ weight.T + bias + residual`` on rows, joined with its backward operator."""

    @staticmethod
    def forward(x, weight, bias, residual, seed, dropout_p, kernel):
        return kernel.forward(x, weight, bias, residual, CODES[""], dropout_p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, seed, ctx.dropout_p, ctx.kernel = inputs
        needs, ctx.shapes = ctx.needs_input_grad, (x.shape, weight.shape)
        ctx.save_for_backward(*operands_to_keep(x, weight, needs), seed)

    @staticmethod
    def backward(ctx, grad):
        x, weight, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = masked(grad, ctx.dropout_p, seed, ctx.kernel)
        d_input, d_weight, d_bias = linear_gradients(
            ctx.kernel, inner, x, weight, needs, ctx.shapes
        )
        return d_input, d_weight, d_bias, grad if needs[3] else None, None, None, None


_linear_add = differentiable(_LinearAdd, tensors=5)


def masked(grad: Tensor, dropout_p: float, seed: Tensor | None, kernel: Kernel) -> Tensor:
    """The gradient before dropout, in a pass of its own: both products and the bias's sum read it,
    and would each have to draw the mask anew."""
    if seed is None:
        return grad
    step = STEPS["activation"][kernel.backend]
    return step.forward(grad.contiguous(), CODES[""], dropout_p, seed)


def operands_to_keep(
    x: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """What the wanted gradients read: the weight's reads the input, and the input's the weight."""
    return x if needs[1] else None, weight if needs[0] else None


def linear_gradients(
    kernel: Kernel,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    needs: tuple[bool, ...],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the linear part; ``needs`` says which of (input, weight, bias) are wanted,
    ``shapes`` are those of x and weight, of which :func:`operands_to_keep` kept one or none."""
    if not (needs[0] or needs[1] or needs[2]):
        return None, None, None
    grad, rows, (shape, weight_shape) = rows_of(grad, grad.shape[-1:]), x, shapes
    heads_joined = len(shape) == 4 and kernel.backend != "cuda"
    if heads_joined:  # attention's heads: whole rows are read there
        shape = (math.prod(grad.shape[:-1]), weight_shape[1])
        if x is not None:  # of heads of size 1, or of one head expanded, what reshape gives is
            rows = last_stride_one(x.transpose(1, 2).reshape(shape))  # a view
    if rows is None:
        rows = _unread(grad, shape)
    if weight is None:
        weight = _unread(grad, weight_shape)
    d_input, d_weight, d_bias = kernel.backward(grad, rows, weight, needs[0], needs[1], needs[2])
    if heads_joined and needs[0]:
        batch, heads, length, head_dim = shapes[0]
        d_input = d_input.view(batch, length, heads, head_dim).transpose(1, 2)
    return (
        d_input if needs[0] else None,
        d_weight if needs[1] else None,
        d_bias if needs[2] else None,
    )


def _unread(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stands for an operand of which an operator reads nothing but the shape; without memory."""
    return like.new_empty(()).expand(shape)


def fake_output(input: Tensor, weight: Tensor) -> Tensor:
    """(rows, out_features), or (batch, length, out_features) of three dimensions and of heads."""
    rows = input.shape[:1] if input.dim() == 2 else (input.shape[0], input.shape[-2])
    return input.new_empty((*rows, weight.shape[0]))


@fake("linear_add")
def _(input, weight, bias, residual, activation, dropout_p=0.0, seed=None):
    return fake_output(input, weight)


@fake("linear_add_backward")
def _(grad, input, weight, input_grad, weight_grad, bias_grad):
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        weight.new_empty((weight.shape[0],) if bias_grad else (0,)),
    )


@vmap_rule("linear_add")
def _(
    operator, batch_size, in_dims, input, weight, bias, residual, activation, dropout_p=0.0,
    seed=None,
):  # fmt: skip
    # With dropout the mask restarts with each sample.
    if in_dims[1] is not None or in_dims[2] is not None or seed is not None:
        return None
    rows = fold(input, in_dims[0], batch_size), fold(residual, in_dims[3], batch_size)
    out = operator(rows[0], weight, bias, rows[1], activation)
    return out.view(batch_size, out.shape[0] // batch_size, *out.shape[1:]), 0


fold_rows("linear_add_backward", batched=(0, 1), per_sample=(4, 5))
