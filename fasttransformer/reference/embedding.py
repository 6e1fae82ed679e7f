r"""Token embedding with the positions added.

    out[n] = scale * weight[input[n]] + position[positions[n]]

`position` is a learned table (position_weight), or with `sinusoidal` the fixed one

    position[p, 2i] = sin(p / 10000^(2i/C))         position[p, 2i+1] = cos(p / 10000^(2i/C))

or both, or neither. The Transformer paper scales the tokens by sqrt(C).

Shapes: input (..., T) int, weight (V, C), position_weight (P, C), positions broadcasts to input
and is 0..T-1 along its last dimension unless given; out (..., T, C) in the weight's dtype.
padding_idx (negative counts from the end) names a row whose look-ups give it no gradient; its
value is used like any other.

Sources: Vaswani et al., 2017 (arXiv:1706.03762), sections 3.4 and 3.5; learned positions:
Gehring et al., 2017 (1705.03122).

>>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
>>> embedding(torch.tensor([1, 0]), weight)
tensor([[3., 4.],
        [1., 2.]])
>>> embedding(torch.tensor([0, 0]), 0 * weight, sinusoidal=True)[0]  # sin(0), cos(0)
tensor([0., 1.])
"""

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype


def embedding(
    input: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    scale: float | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of weight, scaled, plus positions; see the top of this file."""
    wide = compute_dtype(weight)
    out = _rows(weight, input, padding_idx).to(wide)
    if scale is not None:
        out = out * scale
    if sinusoidal or position_weight is not None:
        if positions is None:
            positions = torch.arange(input.shape[-1], device=input.device)
        if position_weight is not None:
            out = out + _rows(position_weight, positions).to(wide)
        if sinusoidal:
            out = out + sinusoid(positions, weight.shape[1]).to(wide)
    return out.to(weight.dtype)


def sinusoid(positions: Tensor, features: int) -> Tensor:
    """The fixed table's rows for the positions, (..., features), in float64."""
    column = torch.arange(features, device=positions.device)
    frequency = 10000.0 ** (-(column - column % 2).to(torch.float64) / features)
    # float64: in float32 the angle of position 100,000 is off by 0.004.
    angle = positions.to(torch.float64).unsqueeze(-1) * frequency
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def _rows(table: Tensor, index: Tensor, padding_idx: int | None = None) -> Tensor:
    """table[index], but a negative index is an error, as one past the end is.

    Look-ups of padding_idx give their row no gradient.
    """
    return torch.nn.functional.embedding(index, table, padding_idx)
