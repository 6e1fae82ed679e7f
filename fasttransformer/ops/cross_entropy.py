"""Cross entropy of logits, torch's own signature; large logits are worked on in pieces of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ..reference.cross_entropy import loss_dtype
from ._front import (
    GRAD_OPTIONS,
    autocast_dtype,
    cast,
    fake,
    float32_at_most,
    is_float,
    last_stride_one,
    needs_grad,
)
from ._function import differentiable, fold, unfold, vmap_rule
from ._index import checked_first, checked_for, kernel_ids
from ._output_layer import by_rows, check_loss, in_one_piece, reduced, reduced_losses


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
        16-bit types. Under autocast, float32. With probabilities, as in torch, in the dtype that
        ``input``, ``target`` and ``weight`` promote to.

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
    target = check_loss(
        op, input, shape, target, weight, reduction, ignore_index, label_smoothing, checked_first
    )
    if autocast_dtype(input.device.type) is not None:
        input = cast(input, torch.float32)  # on autocast's float32 list
    kernel = choose(
        op, input.device.type, input.dtype, _options(input, target, weight), (), backend
    )
    if not target.is_floating_point():
        classes = shape[min(1, len(shape) - 1)]
        target = checked_for(kernel, op, "target", target, classes, ignore_index)
    if kernel.forward is not None:
        return _on_kernel(input, target, weight, reduction, ignore_index, label_smoothing, kernel)
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
    loss = reduced(rows, target, weight, reduction, ignore_index)
    return loss.to(loss_dtype(input, target, weight))


def _options(input: Tensor, target: Tensor, weight: Tensor | None) -> frozenset[str]:
    options = GRAD_OPTIONS[needs_grad(input, target, weight)]
    if needs_grad(weight):
        options |= {"weight_grad"}
    return options | {"probabilities"} if target.is_floating_point() else options


def _on_kernel(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    kernel: Kernel,
) -> Tensor:
    """The losses of all rows by the kernel, in float32, and their sum or mean by torch."""
    class_dim = min(1, input.dim() - 1)
    rows = input if input.dim() == 2 else input.movedim(class_dim, -1)
    if rows.dim() != 2:
        rows = rows.reshape(target.numel(), input.shape[class_dim])
    rows = last_stride_one(rows)
    if weight is not None:
        weight = float32_at_most(weight).contiguous()
    ids = kernel_ids(target)
    ids = ids if ids.dim() == 1 else ids.view(-1)
    args = (rows, ids, weight, ignore_index, float(label_smoothing))
    if needs_grad(input):
        losses, statistics = _cross_entropy_with_grad(*args, kernel)
    else:
        losses, statistics = kernel.forward(*args)
    if reduction == "none":
        return losses.view(target.shape).to(input.dtype)
    loss = reduced_losses(losses, statistics, reduction == "mean")
    return loss if input.dtype is torch.float32 else loss.to(input.dtype)


class _CrossEntropy:
    @staticmethod
    def forward(x, target, weight, ignore_index, label_smoothing, kernel):
        return kernel.forward(x, target, weight, ignore_index, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, ctx.ignore_index, ctx.label_smoothing, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, target, weight, statistics = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.label_smoothing)
        d_input = ctx.kernel.backward(grad, x, target, weight, statistics, *options)
        return d_input, None, None, None, None, None


_cross_entropy_with_grad = differentiable(_CrossEntropy, tensors=3)


@fake("cross_entropy")
def _(input, target, weight, ignore_index, label_smoothing):
    rows = input.shape[0]
    return (
        input.new_empty((rows,), dtype=torch.float32),
        input.new_empty((rows, 4), dtype=torch.float32),
    )


@fake("cross_entropy_backward")
def _(grad, input, target, weight, statistics, ignore_index, label_smoothing):
    return input.new_empty(input.shape)


@vmap_rule("cross_entropy")
def _(operator, batch_size, in_dims, input, target, weight, ignore_index, label_smoothing):
    if in_dims[2] is not None:
        return None
    rows = (fold(t, d, batch_size) for t, d in zip((input, target), in_dims))
    return unfold(operator(*rows, weight, ignore_index, label_smoothing), batch_size)


@vmap_rule("cross_entropy_backward")
def _(operator, batch_size, in_dims, grad, input, target, weight, statistics, *options):
    if in_dims[3] is not None:
        return None
    given = zip((grad, input, target, statistics), (*in_dims[:3], in_dims[4]))
    grad, input, target, statistics = (fold(t, d, batch_size) for t, d in given)
    d_input = operator(grad, input, target, weight, statistics, *options)
    return d_input.view(batch_size, -1, d_input.shape[1]), 0
