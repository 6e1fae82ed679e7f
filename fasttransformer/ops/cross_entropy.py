"""Cross entropy of logits, torch's own signature; large logits are worked on in pieces of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import autocast_dtype, cast, is_float, needs_grad
from ._output_layer import by_rows, check_loss, in_one_piece, reduced

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Cross entropy, as :func:`torch.nn.functional.cross_entropy`.

    .. math:: \ell_n = -(1 - s)\, w_{y_n} \log p_{n, y_n}
        - \frac{s}{C} \sum_c w_c \log p_{n, c}, \qquad p_n = \text{softmax}(x_n)

    with label smoothing s, and class weights w (1 unless given). ``"mean"`` divides the sum by
    :math:`\sum_n w_{y_n}` over the rows that count. Rows whose class is ``ignore_index`` count
    nowhere: loss 0 and gradient 0.

    Args:
        input: logits (classes,), (batch, classes) or (batch, classes, \*), float.
        target: classes: integers of shape (), (batch,) or (batch, \*); or probabilities: float, of
            ``input``'s shape, for which the loss is :math:`-\sum_c w_c p'_c \log p_c` with
            :math:`p' = (1 - s) p + s / C`, and the mean is over the rows.
        weight: (classes,), of any float dtype.
        size_average, reduce: torch's old names of ``reduction``.
        ignore_index: a class, or any other number, that marks rows to leave out.
        reduction: ``"none"``, ``"mean"`` (of no rows: NaN, as in torch) or ``"sum"``.
        label_smoothing: in [0, 1].
        backend: forces one backend for this call.

    Returns:
        A scalar, or with ``"none"`` a loss per row, in ``input``'s dtype; computed in float32 for
        16-bit types. Under autocast, float32.

    Raises:
        TypeError: logits or weights that are not floating point; a target of bools.
        ValueError: shapes that don't fit; a class outside [0, classes) (in compiled graphs too; a
            device-side assertion on a GPU); an option out of range.

    Source: label smoothing: Szegedy et al., 2015 (arXiv:1512.00567).

    >>> import torch, fasttransformer as ft
    >>> ft.cross_entropy(torch.tensor([[0.0, 0.0], [5.0, -5.0]]), torch.tensor([1, -100]))
    tensor(0.6931)
    """
    op = "cross_entropy"
    is_float(op, input=input)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if input.dim() == 0:
        raise ValueError(
            f"{op}: input has no dimensions; it must be (classes,) or (batch, classes, *)"
        )
    shape = tuple(input.shape)
    target = check_loss(op, input, shape, target, weight, reduction, ignore_index, label_smoothing)
    if autocast_dtype(input.device.type) is not None:
        input = cast(input, torch.float32)  # on autocast's float32 list
    options = _GRAD if needs_grad(input, target, weight) else _NONE
    choose(op, input.device.type, input.dtype, options, (), backend)
    if input.dim() == 1 or in_one_piece(input.numel()):
        return reference.cross_entropy(
            input,
            target,
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    wide = torch.promote_types(input.dtype, torch.float32)

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        return reference.cross_entropy(
            logits.to(wide),
            target,
            weight,
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    rows = by_rows(losses, input[0].numel(), input, target)
    return reduced(rows, target, weight, reduction, ignore_index).to(input.dtype)
