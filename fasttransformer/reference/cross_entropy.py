r"""Cross entropy of logits against target classes, or against target probabilities.

    logp    = log_softmax(x)
    loss[n] = -(1 - s) * w[y] * logp[y]  -  s/C * sum_c w[c] * logp[c]       class y = target[n]
    loss[n] = -sum_c w[c] * p'[c] * logp[c]      p' = (1 - s) * p + s/C      probabilities p

with label smoothing s and class weights w (1 unless given). Reduction "sum" adds the rows; "mean"
divides that by sum_n w[y_n] for classes (the mean when there are no weights), by the number of
rows for probabilities; "none" returns them. Rows whose class is ignore_index count nowhere: loss
0, gradient 0, no share in the mean. (The mean over no rows at all is 0/0 = NaN, as in torch.)

Shapes: input (C,), (N, C) or (N, C, d...); target () or (N,) or (N, d...) int for classes,
the input's shape, float, for probabilities. Output in the input's dtype; with probabilities, of
another dtype as torch promotes them, :func:`loss_dtype`.

Sources: the softmax loss: Bridle, 1990; label smoothing: Szegedy et al., 2015 (arXiv:1512.00567).

>>> cross_entropy(torch.tensor([[0.0, 0.0], [5.0, -5.0]]), torch.tensor([1, -100]))
tensor(0.6931)
"""

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The input's; with probabilities, which torch multiplies, what all dtypes promote to."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy (size_average and reduce: its old names of reduction)."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction {reduction!r}: none, mean or sum is allowed")
    class_dim = 0 if input.ndim == 1 else 1
    if not target.is_floating_point():
        # What an ignored row holds, NaN too, must not reach a gradient as 0 * NaN.
        input = torch.where((target == ignore_index).unsqueeze(class_dim), 0.0, input)
    logp = torch.log_softmax(input.to(compute_dtype(input)), class_dim).movedim(class_dim, -1)
    classes = logp.shape[-1]
    dtype = loss_dtype(input, target, weight)
    weight = logp.new_ones(classes) if weight is None else weight.to(logp.dtype)

    if target.is_floating_point():
        probability = target.to(logp.dtype).movedim(class_dim, -1)
        if label_smoothing and classes:
            probability = (1.0 - label_smoothing) * probability + label_smoothing / classes
        loss = -(weight * probability * logp).sum(-1)
        divisor = torch.full_like(loss, 1.0)
    else:
        ignored = target == ignore_index
        target = torch.where(ignored, 0, target).long()
        if classes == 0:  # then every row is left out
            divisor = loss = logp.sum(-1)
        else:
            divisor = torch.where(ignored, 0.0, weight[target])
            loss = -divisor * logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if label_smoothing and classes:
            smooth = -(weight * logp).sum(-1) / classes
            loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
        loss = torch.where(ignored, 0.0, loss)

    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / divisor.sum()
    return loss.to(dtype)
