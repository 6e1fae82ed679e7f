r"""Softmax and its logarithm, with a scale and a mask.

    softmax(x)[i] = exp(scale*x[i]) / sum_j exp(scale*x[j])       over the entries the mask allows
    log_softmax   = scale*x[i] - log(sum_j exp(scale*x[j]))

Entries that are masked give 0 (log: -inf), and so does a whole row in which everything is masked;
their gradient is 0. Masking comes after scaling, so a scale of 0 or less is fine, and a masked
entry may hold anything, NaN too. Without a mask a row of -inf alone is NaN, as in torch.

Shapes: input any, output the same; mask broadcasts to it. The largest entry of a row is taken off
before exp, so that nothing overflows.

Source: Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990.

>>> softmax(torch.zeros(2, 2), is_causal=True)
tensor([[1.0000, 0.0000],
        [0.5000, 0.5000]])
"""

import math

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax of scale*input over `dim`.

    mask is bool, True = takes part. is_causal lets position i of dimension -2 see j <= i of
    dimension -1, like the mask torch.ones(S, T).tril(). dtype is the output's (the input's unless
    given), and at least that precision is computed in.

    >>> softmax(torch.tensor([0.0, 9.0, 0.0]), mask=torch.tensor([True, False, True]))
    tensor([0.5000, 0.0000, 0.5000])
    """
    scores, _, empty = _masked_scores(input, dim, scale, mask, is_causal, dtype)
    out = torch.softmax(scores, dim)
    if empty is not None:
        out = torch.where(empty, 0.0, out)
    return out.to(dtype or input.dtype)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logarithm of `softmax`, without taking the logarithm of a rounded number.

    >>> log_softmax(torch.tensor([0.0, 1000.0]))
    tensor([-1000.,     0.])
    """
    scores, allowed, empty = _masked_scores(input, dim, scale, mask, is_causal, dtype)
    out = torch.log_softmax(scores, dim)
    if allowed is not None and empty is not None:
        out = torch.where(allowed & ~empty, out, -math.inf)
    return out.to(dtype or input.dtype)


def _masked_scores(
    input: Tensor,
    dim: int,
    scale: float | None,
    mask: Tensor | None,
    is_causal: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scores, allowed, empty): allowed in scores' shape, empty with size 1 in `dim`."""
    wide = compute_dtype(input)
    scores = input.to(wide if dtype is None else torch.promote_types(wide, dtype))
    if scale is not None:
        scores = scores * scale
    allowed = mask
    if is_causal:
        rows, columns = input.shape[-2:]
        i = torch.arange(rows, device=input.device)[:, None]
        causal = torch.arange(columns, device=input.device) <= i
        allowed = causal if allowed is None else allowed & causal
    if allowed is None:
        return scores, None, None
    allowed = allowed.expand(scores.shape)
    empty = ~allowed.any(dim=dim, keepdim=True)
    scores = torch.where(allowed, scores, -math.inf)
    # Any number will do in an empty row: softmax of -inf alone is NaN, in the gradient too.
    return torch.where(empty, 0.0, scores), allowed, empty
