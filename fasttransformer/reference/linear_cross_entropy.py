r"""Cross entropy of a linear layer's output: the training loss of a language model.

    loss = cross_entropy(input @ linear_weight.T + linear_bias, target)

Logits of 8k tokens over 128k words are 4 GB in float32; kernels compute them block by block and
never store them. Here they are stored.

Shapes: input (in_features,) or (N, in_features), linear_weight (V, in_features), linear_bias (V,);
target as for cross_entropy. For a loss over more dimensions linear_weight is
(V, d..., in_features), linear_bias (V,) or (V, d...), and target (N, d...).
Output in the input's dtype, rounded once.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024
(arXiv:2411.09009).

>>> import torch
>>> linear_cross_entropy(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))  # log 4
tensor(1.3863)
"""

import torch
from torch import Tensor

from fasttransformer.reference.cross_entropy import cross_entropy, loss_dtype
from fasttransformer.reference.precision import compute_dtype, matmul


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.linear_cross_entropy; see the top of this file."""
    wide = compute_dtype(input)
    if not target.is_floating_point():
        # An ignored row of the input takes no part in the weight's gradient, NaN or not. Where a
        # row has several targets, all of them must be ignored.
        ignored = target == ignore_index
        if ignored.ndim >= input.ndim:
            ignored = ignored.flatten(input.ndim - 1).all(-1)
        input = torch.where(ignored.unsqueeze(-1), 0.0, input)
    logits = matmul(input.to(wide), linear_weight.to(wide).flatten(0, -2).T)
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    if linear_bias is not None:
        # (V,) belongs to the class dimension, in front of any d...
        extra = linear_weight.ndim - 1 - linear_bias.ndim
        logits = logits + linear_bias.to(wide).reshape(linear_bias.shape + (1,) * extra)
    loss = cross_entropy(
        logits,
        target,
        weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.to(loss_dtype(input, target, weight))
