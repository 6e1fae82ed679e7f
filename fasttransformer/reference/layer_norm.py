r"""Layer normalization: each row is centred and brought to variance one.

    mean = sum(x) / C            var = sum((x - mean)^2) / C
    y    = (x - mean) / sqrt(var + eps) * weight + bias

Shapes: input (..., *normalized_shape), weight and bias normalized_shape; C is the number of
elements of normalized_shape. Output in the input's dtype, whatever the weight's is.

The variance is taken of the centred values, not as E[x^2] - mean^2, which cancels when the mean is
large. With one feature x - mean is exactly 0, so the output is the bias, and the gradients of
input and weight are 0.

Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450).

>>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
tensor([[-1.,  1.]])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype


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
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    y = centred * torch.rsqrt(variance + eps)
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
