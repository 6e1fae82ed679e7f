r"""The k most probable classes of an output layer, with their probabilities.

    p = softmax((input @ weight.T + bias) / temperature)         values, indices = top k of p

Values are probabilities among all V classes, so they sum to at most 1 and their logarithms are the
scores of a beam search. They fall from left to right; of equal logits the lower index comes first.
Kernels keep k candidates per block and a running log-sum-exp, and never store the logits.

Shapes: input (..., C), weight (V, C), bias (V,); values (..., k) in the input's dtype, indices
(..., k) int64.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867),
section 4.

>>> import torch
>>> values, indices = linear_topk(torch.ones(1), torch.tensor([[0.0], [2.0], [2.0]]), k=2)
>>> indices
tensor([1, 2])
"""

from torch import Tensor

from fasttransformer.reference.linear_add import linear
from fasttransformer.reference.softmax import softmax


def linear_topk(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k most probable classes."""
    if not 0 <= k <= weight.shape[0]:
        raise ValueError(f"linear_topk: k is {k}, and there are {weight.shape[0]} classes")
    logits = linear(input, weight, bias) / temperature
    # A stable sort settles ties, which topk leaves open.
    indices = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return softmax(logits).gather(-1, indices).to(input.dtype), indices
