r"""Linear layer with an activation and a residual.

    out = dropout(activation(input @ weight.T + bias)) + residual

    relu       max(x, 0)
    gelu       x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))
    gelu_tanh  x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
    silu       x / (1 + exp(-x))

Shapes: input (..., in_features), weight (out_features, in_features), bias (out_features,),
residual and out (..., out_features). The input may also be attention's own output (B,H,S,E) with
H*E = in_features: its heads are joined to (B, S, H*E), and out is (B, S, out_features). Where the
two readings meet (H = 1), a residual of three dimensions asks for the joined one.
Output in the input's dtype; the sum is rounded once.

Sources: Vaswani et al., 2017 (arXiv:1706.03762), section 3.2.2; GELU: Hendrycks, Gimpel, 2016
(1606.08415); SiLU: Elfwing et al., 2017 (1702.03118).

>>> import torch
>>> weight = torch.tensor([[1.0, 1.0]])
>>> linear_add(torch.tensor([[1.0, 2.0]]), weight, residual=torch.tensor([[10.0]]))
tensor([[13.]])
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fasttransformer.reference.dropout import dropout
from fasttransformer.reference.precision import compute_dtype, matmul

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear_add(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(activation(input @ weight.T + bias)) + residual.

    >>> import torch
    >>> heads = torch.randn(2, 3, 4, 5)  # batch, heads, sequence, head size
    >>> linear_add(heads, torch.randn(7, 15)).shape
    torch.Size([2, 4, 7])
    """
    out = linear(join_heads(input, weight, residual), weight, bias)
    if activation:
        out = ACTIVATIONS[activation](out)
    out = dropout(out, dropout_p, seed)
    if residual is not None:
        out = out + residual.to(out.dtype)
    return out.to(input.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, computed and returned in the wide dtype, not yet rounded."""
    wide = compute_dtype(input)
    out = matmul(input.to(wide), weight.to(wide).T)
    return out if bias is None else out + bias.to(wide)


def join_heads(input: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """(B,H,S,E) to (B,S,H*E) where the input is attention's output; any other input as it is."""
    in_features = weight.shape[1]
    if input.ndim != 4 or input.shape[1] * input.shape[3] != in_features:
        return input
    if input.shape[3] == in_features and (residual is None or residual.ndim != 3):
        return input
    return input.transpose(1, 2).flatten(2)
