r"""Residual addition followed by layer normalization.

    summed = residual + dropout(input)
    normed = layer_norm(summed) * weight + bias

Both are returned: a post-norm layer goes on with `normed`, a pre-norm layer normalizes the next
block's input with `normed` and carries `summed` on as the next residual. `summed` is rounded to
the input's dtype, and the statistics are those of the rounded values.

Shapes: input, residual, normed, summed (..., *normalized_shape); weight, bias normalized_shape.

Sources: He et al., "Deep Residual Learning", 2015 (arXiv:1512.03385); Vaswani et al., 2017
(1706.03762), section 3.1; Ba et al., 2016 (1607.06450).

>>> import torch
>>> normed, summed = add_layer_norm(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), (2,))
>>> summed
tensor([1., 3.])
"""

from collections.abc import Sequence

from torch import Tensor

from fasttransformer.reference.dropout import dropout
from fasttransformer.reference.layer_norm import layer_norm
from fasttransformer.reference.precision import compute_dtype


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(normed, summed); `seed` fixes the dropout mask."""
    summed = add(input, residual, dropout_p, seed)
    return layer_norm(summed, normalized_shape, weight, bias, eps), summed


def add(input: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """residual + dropout(input), rounded once to the input's dtype."""
    wide = compute_dtype(input)
    return (residual.to(wide) + dropout(input.to(wide), dropout_p, seed)).to(input.dtype)
