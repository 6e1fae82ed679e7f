r"""Output projection, residual and root-mean-square normalization.

    summed = dropout(input @ weight.T + bias) + residual
    normed = rms_norm(summed) * norm_weight

Shapes: input (..., in_features) or attention's output (B,H,S,E) with H*E = in_features, weight
(out_features, in_features), bias and norm_weight (out_features,), residual, normed and summed
(..., out_features). `summed` is rounded to the input's dtype, and the mean square is that of the
rounded values.

Sources: Vaswani et al., 2017 (arXiv:1706.03762); Zhang, Sennrich, 2019 (1910.07467).

>>> import torch
>>> x, weight = torch.tensor([[2.0, 3.0]]), torch.eye(2)
>>> normed, summed = linear_add_rms_norm(x, weight, None, torch.ones(1, 2), None)
>>> summed
tensor([[3., 4.]])
"""

from torch import Tensor

from fasttransformer.reference.linear_add import linear_add
from fasttransformer.reference.rms_norm import rms_norm


def linear_add_rms_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """(normed, summed), or normed alone."""
    summed = linear_add(input, weight, bias, residual, None, dropout_p, seed)
    normed = rms_norm(summed, summed.shape[-1:], norm_weight, eps)
    return (normed, summed) if return_sum else normed
