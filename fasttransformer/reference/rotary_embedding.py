r"""Rotary position embedding: pairs of features are turned by an angle that grows with position.

    (a, b)  ->  (a cos - b sin,  b cos + a sin)          angle[position, i] = position * freq_i

The pairs are (x[i], x[i + D/2]), or (x[2i], x[2i+1]) when interleaved. The product of a query and a
key turned this way depends on their distance alone. Turning keeps the length of each pair, and the
gradient is turned back by the same angle.

Shapes: query (B,H,S,D), key (B,G,S,D), the same returned, in their own dtypes. cos and sin are
(positions, W) or (B or 1, positions, W). W is D/2, one angle per pair, or D for half-split pairs,
the angles twice, torch.cat([angle, angle], -1), as transformers makes them. Row i of the table is
token i's, or row position_ids[b,i] where position_ids, (S,) or (B or 1, S), is given.
To turn the first features only (partial rotary), pass those features.

Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864).

>>> query = key = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
>>> angle = torch.tensor([[torch.pi / 2]])
>>> turned, _ = rotary_embedding(query, key, angle.cos(), angle.sin())
>>> turned.flatten().round().abs()
tensor([0., 1.])
"""

import torch
from torch import Tensor

from fasttransformer.reference.precision import compute_dtype


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(query, key), each turned; see the top of this file."""
    return (
        rotate(query, cos, sin, interleaved, position_ids),
        rotate(key, cos, sin, interleaved, position_ids),
    )


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, position_ids: Tensor | None
) -> Tensor:
    """x (B, heads, S, D), each pair of features turned by its angle."""
    wide = x.to(compute_dtype(x))
    cos, sin = (_angles(table, x, interleaved, position_ids).to(wide.dtype) for table in (cos, sin))
    if interleaved:
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = wide.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)


def _angles(table: Tensor, x: Tensor, interleaved: bool, position_ids: Tensor | None) -> Tensor:
    """The table's rows for x's tokens, one number per pair: (B or 1, 1, S, D/2)."""
    tokens, features = x.shape[-2:]
    if table.shape[-1] == features and not interleaved:
        table = table[..., : features // 2]
    if features % 2 or table.shape[-1] != features // 2:
        raise ValueError(
            f"rotary_embedding: cos and sin have width {table.shape[-1]}, head size {features} "
            f"needs {features // 2}" + ("" if interleaved else f" or {features}")
        )
    if table.ndim == 2:
        table = table.unsqueeze(0)
    if position_ids is None:
        if table.shape[1] < tokens:
            raise ValueError(
                f"rotary_embedding: cos and sin have {table.shape[1]} positions for {tokens} tokens"
            )
        return table[:, :tokens].unsqueeze(1)
    rows = torch.atleast_2d(position_ids).long().unsqueeze(-1)
    return torch.take_along_dim(table, rows, dim=1).unsqueeze(1)
