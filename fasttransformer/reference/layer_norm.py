r"""Layer normalization: each row is centred and brought to variance one.

    mean = sum(x) / C            var = sum((x - mean)^2) / C
    y    = (x - mean) / sqrt(var + eps) * weight + bias

Shapes: input (..., *normalized_shape), weight and bias normalized_shape; C is the number of
elements of normalized_shape. Output in the input's dtype, whatever the weight's is.

The variance is taken of the centred values, not as E[x^2] - mean^2, which cancels when the mean is
large. In a row of one number x - mean is exactly 0, so the output is the bias, and the gradient of
weight is 0; with one feature the input's is 0 too. Rows whose squares would overflow, or vanish
with eps 0, are scaled by a power of 2 first, which cancels.

Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450).

>>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
tensor([[-1.,  1.]])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype, scale_for_squares


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm.

    >>> layer_norm(torch.tensor([1e6]), (1,), torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([3.])
    """
    dims = normalized_dims("layer_norm", input, normalized_shape)
    x = input.to(compute_dtype(input))
    mean = x.mean(dims, keepdim=True)
    if x.numel() > 0:  # the mean of a row of one number is that number, without a rounding
        low, high = x.detach().amin(dims, keepdim=True), x.detach().amax(dims, keepdim=True)
        mean = mean + torch.where(low == high, low - mean.detach(), 0.0)
    centred = x - mean
    scale = scale_for_squares(centred, dims, eps)
    centred = centred * scale
    variance = (centred * centred).mean(dims, keepdim=True)
    y = centred * torch.rsqrt(variance + eps * scale * scale)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(input.dtype)


def normalized_dims(op: str, input: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    """The dimensions to take statistics over, as negative numbers."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape {shape} must be the end of input's shape {tuple(input.shape)}"
        )
    return list(range(-len(shape), 0))
