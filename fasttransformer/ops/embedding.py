"""Token embedding with learned or sinusoidal positions added."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ._front import (
    FLOATS,
    GRAD_OPTIONS,
    fake,
    is_float,
    is_float_if_given,
    last_stride_one,
    needs_grad,
    same_device,
    same_dtype,
)
from ._function import differentiable, vmap_rule
from ._index import checked_first, checked_for, is_index, is_index_if_given, kernel_ids


def embedding(
    input: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    scale: float | None = None,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Rows of ``weight`` for the tokens, scaled, with their positions added.

    .. math:: \text{out}_n = \text{scale} \cdot W_{\text{input}_n} + P_{\text{positions}_n}
        + \text{PE}(\text{positions}_n)

    where :math:`\text{PE}(p)_{2i} = \sin(p / 10000^{2i/C})` and
    :math:`\text{PE}(p)_{2i+1} = \cos(p / 10000^{2i/C})`; each term is there if asked for.

    Args:
        input: token ids of any integer dtype, (\*, length).
        weight: (vocabulary, features), float.
        positions: integers that broadcast to ``input``; 0 … length − 1 along its last dimension
            unless given. Used with ``position_weight`` or ``sinusoidal``.
        position_weight: learned table P, (positions, features), of ``weight``'s dtype.
        sinusoidal: adds the fixed table PE, of any length.
        scale: multiplies the tokens' rows (the Transformer paper's is :math:`\sqrt C`).
        padding_idx: a row of ``weight`` whose look-ups give it no gradient; negative counts from
            the end. Its value is used like any other, and other uses of ``weight`` still train it.
        backend: forces one backend for this call.

    Returns:
        (\*, length, features) in ``weight``'s dtype, rounded once.

    Raises:
        TypeError: ids that are no integers, tables that are not floating point or differ in dtype.
        ValueError: shapes that don't fit; an id or position outside its table, in compiled graphs
            too (a device-side assertion on a GPU); ``padding_idx`` outside [−vocabulary,
            vocabulary).

    Source: Vaswani et al., 2017 (arXiv:1706.03762), sections 3.4 and 3.5.

    >>> import torch, fasttransformer as ft
    >>> ft.embedding(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), scale=10.0)
    tensor([[30., 40.],
            [10., 20.]])
    """
    op = "embedding"
    plain = (  # nothing to find fault with, at a look
        positions is None
        and position_weight is None
        and isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and input.dtype is torch.int64
        and weight.dtype in FLOATS
        and input.device == weight.device
    )
    if not plain:
        is_index(op, input=input)
        is_index_if_given(op, positions=positions)
        is_float(op, weight=weight)
        is_float_if_given(op, position_weight=position_weight)
        same_device(op, input, weight=weight, positions=positions, position_weight=position_weight)
        same_dtype(op, weight, position_weight=position_weight)
    for name, table in (("weight", weight), ("position_weight", position_weight)):
        if table is not None and table.dim() != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}; it must have two "
                "dimensions, (rows, features)"
            )
    rows, features = weight.shape
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx is {padding_idx}; it must be in [{-rows}, {rows})")
    if position_weight is not None and position_weight.shape[1] != features:
        raise ValueError(
            f"{op}: position_weight has {position_weight.shape[1]} features, but "
            f"weight has {features}"
        )
    if sinusoidal or position_weight is not None:
        positions = _checked_positions(op, input, positions, position_weight)
    elif positions is not None:
        raise ValueError(
            f"{op}: positions are given, but neither position_weight nor sinusoidal "
            "says what to add for them"
        )
    index = checked_first(op, "input", input, rows)
    options = GRAD_OPTIONS[needs_grad(weight, position_weight)]
    kernel = choose(op, weight.device.type, weight.dtype, options, (), backend)
    index = checked_for(kernel, op, "input", index, rows)
    if positions is not None and position_weight is not None:
        positions = checked_for(kernel, op, "positions", positions, position_weight.shape[0])
    if kernel.forward is not None:
        return _on_kernel(
            index, weight, positions, position_weight, sinusoidal, scale, padding_idx, kernel
        )
    return reference.embedding(
        index,
        weight,
        positions=positions,
        position_weight=position_weight,
        sinusoidal=sinusoidal,
        scale=scale,
        padding_idx=padding_idx,
    )


def _on_kernel(
    input: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    position_weight: Tensor | None,
    sinusoidal: bool,
    scale: float | None,
    padding_idx: int | None,
    kernel: Kernel,
) -> Tensor:
    if positions is not None:
        positions = kernel_ids(_repeated(positions, input)).view(-1)
    tables = (last_stride_one(weight), position_weight)
    if position_weight is not None:
        tables = (tables[0], last_stride_one(position_weight))
    scale = 1.0 if scale is None else float(scale)
    ids = kernel_ids(input)
    if not needs_grad(weight, position_weight):
        return kernel.forward(ids, tables[0], positions, tables[1], sinusoidal, scale)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _embedding_with_grad(*tables, ids, positions, sinusoidal, scale, padding, kernel)


def _repeated(positions: Tensor, input: Tensor) -> Tensor:
    """The positions as operators take them: an array that repeats along the tokens."""
    shape = tuple(positions.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    if shape == tuple(input.shape)[input.dim() - len(shape) :]:
        return positions
    return positions.expand(input.shape)


class _Embedding:
    @staticmethod
    def forward(weight, position_weight, ids, positions, sinusoidal, scale, padding, kernel):
        return kernel.forward(ids, weight, positions, position_weight, sinusoidal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, position_weight, ids, positions, _, ctx.scale, ctx.padding, ctx.kernel = inputs
        ctx.rows = (weight.shape[0], 0 if position_weight is None else position_weight.shape[0])
        ctx.save_for_backward(ids, positions)

    @staticmethod
    def backward(ctx, grad):
        ids, positions = ctx.saved_tensors
        grad = last_stride_one(grad.reshape(ids.numel(), grad.shape[-1]))
        d_weight = d_positions = None
        if ctx.needs_input_grad[0]:
            order = ids.view(-1).sort(stable=True)
            d_weight = ctx.kernel.backward(grad, *order, ctx.rows[0], ctx.scale, ctx.padding)
        if ctx.needs_input_grad[1]:
            order = _sorted_positions(ids, positions)
            d_positions = ctx.kernel.backward(grad, *order, ctx.rows[1], 1.0, -1)
        return d_weight, d_positions, None, None, None, None, None, None


_embedding_with_grad = differentiable(_Embedding, tensors=4)


def _sorted_positions(ids: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's position in ascending order, and the tokens they are of."""
    tokens = ids.numel()
    if positions is not None:
        repeats = tokens // max(1, positions.numel())
        ordered, order = positions.repeat(repeats).sort(stable=True)
        return ordered, order
    length = ids.shape[-1]
    rows = torch.arange(tokens, device=ids.device).view(-1, length) if tokens else ids.view(-1, 1)
    order = rows.t().reshape(-1)  # a table of 0 … length − 1 needs no sorting
    return order % max(1, length), order


def _checked_positions(
    op: str, input: Tensor, positions: Tensor | None, table: Tensor | None
) -> Tensor | None:
    if positions is None:
        if input.dim() == 0:
            raise ValueError(f"{op}: input has no dimensions, so its position must be given")
        if table is not None and input.shape[-1] > table.shape[0]:
            raise ValueError(
                f"{op}: input has length {input.shape[-1]}, but position_weight has "
                f"{table.shape[0]} positions"
            )
        return None
    own, shape = positions.shape, input.shape
    if len(own) > len(shape) or any(n != 1 and n != m for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(
            f"{op}: positions of shape {tuple(own)} do not broadcast to input's shape "
            f"{tuple(shape)}"
        )
    return positions if table is None else checked_first(op, "positions", positions, table.shape[0])


@fake("embedding")
def _(input, weight, positions, position_weight, sinusoidal, scale):
    return weight.new_empty((*input.shape, weight.shape[1]))


@fake("embedding_backward")
def _(grad, ids, order, rows, scale, padding_idx):
    return grad.new_empty((rows, grad.shape[1]))


@vmap_rule("embedding")
def _(operator, batch_size, in_dims, input, *others):
    if in_dims[1:4] != (None, None, None):
        return None
    return operator(input.movedim(in_dims[0], 0).contiguous(), *others), 0


@vmap_rule("embedding_backward")
def _(operator, batch_size, in_dims, *args):
    return None
