r"""Root-mean-square normalization: each row is divided by its root mean square; no centring.

    y = x / sqrt(sum(x^2) / C + eps) * weight

Shapes: input (..., *normalized_shape), weight normalized_shape; C is the number of elements of
normalized_shape. Output in the input's dtype. eps None is torch's rule: the machine epsilon of the
dtype that is computed in, float32's for 16-bit inputs.

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).

>>> rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), (4,))
tensor([[1.2000, 1.6000, 0.0000, 0.0000]])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttransformer.reference.layer_norm import normalized_dims
from fasttransformer.reference.precision import compute_dtype, scale_for_squares


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm; see the top of this file."""
    dims = normalized_dims("rms_norm", input, normalized_shape)
    x = input.to(compute_dtype(input))
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    scale = scale_for_squares(x, dims, eps)  # cancels
    x = x * scale
    y = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps * scale * scale)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(input.dtype)
