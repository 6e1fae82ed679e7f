r"""Residual addition followed by root-mean-square normalization.

    summed = residual + dropout(input)
    normed = rms_norm(summed) * weight

Both are returned, as by add_layer_norm: `summed` is the next block's residual. It is rounded to
the input's dtype, and the mean square is that of the rounded values.

Shapes: input, residual, normed, summed (..., *normalized_shape); weight normalized_shape.

Sources: He et al., 2015 (arXiv:1512.03385); Zhang, Sennrich, 2019 (1910.07467).

>>> import torch
>>> normed, summed = add_rms_norm(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), (2,))
>>> summed
tensor([3., 4.])
"""

from collections.abc import Sequence

from torch import Tensor

from fasttransformer.reference.add_layer_norm import add
from fasttransformer.reference.rms_norm import rms_norm


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(normed, summed); `seed` fixes the dropout mask."""
    summed = add(input, residual, dropout_p, seed)
    return rms_norm(summed, normalized_shape, weight, eps), summed
