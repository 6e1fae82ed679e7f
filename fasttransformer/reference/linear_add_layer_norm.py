r"""Output projection, residual and layer normalization: the end of a post-norm attention block.

    summed = dropout(input @ weight.T + bias) + residual
    normed = layer_norm(summed) * norm_weight + norm_bias

Shapes: input (..., in_features) or attention's output (B,H,S,E) with H*E = in_features, weight
(out_features, in_features), bias, norm_weight, norm_bias (out_features,), residual, normed and
summed (..., out_features). `summed` is rounded to the input's dtype, and the statistics are those
of the rounded values.

Sources: Vaswani et al., 2017 (arXiv:1706.03762), section 3.1; Ba et al., 2016 (1607.06450).

>>> import torch
>>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
>>> normed, summed = linear_add_layer_norm(x, weight, None, torch.ones(1, 2), None, None, 0.0)
>>> normed, summed
(tensor([[-1.,  1.]]), tensor([[2., 3.]]))
"""

from torch import Tensor

from fasttransformer.reference.layer_norm import layer_norm
from fasttransformer.reference.linear_add import linear_add


def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """(normed, summed), or normed alone."""
    summed = linear_add(input, weight, bias, residual, None, dropout_p, seed)
    normed = layer_norm(summed, summed.shape[-1:], norm_weight, norm_bias, eps)
    return (normed, summed) if return_sum else normed
