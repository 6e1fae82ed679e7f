"""Token embedding with learned or sinusoidal positions added."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import is_float, needs_grad, same_device, same_dtype
from ._index import checked_index, is_index

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


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
    is_index(op, input=input, positions=positions)
    is_float(op, weight=weight, position_weight=position_weight)
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
    index = checked_index(op, "input", input, rows)
    options = _GRAD if needs_grad(weight, position_weight) else _NONE
    choose(op, weight.device.type, weight.dtype, options, (), backend)
    return reference.embedding(
        index,
        weight,
        positions=positions,
        position_weight=position_weight,
        sinusoidal=sinusoidal,
        scale=scale,
        padding_idx=padding_idx,
    )


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
    return positions if table is None else checked_index(op, "positions", positions, table.shape[0])
