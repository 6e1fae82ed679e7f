r"""Exact merge of attention over parts of the keys.

    lse = log(sum_p exp(lse_p))              out = sum_p exp(lse_p - lse) * out_p

Each part is attention over some of the keys, with the log-sum-exp of its scores. The merge is the
attention over all of them, to rounding: softmax's numerator and denominator are sums over keys.
This is what lets keys be split over blocks of a decode kernel, or over machines in a ring.

Shapes: out_p (..., E), lse_p (...). A part without any key has lse_p = -inf and counts nothing;
where no part has a key, out is 0 and lse -inf.

Sources: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867);
Dao et al., "FlashAttention", 2022 (2205.14135).

>>> out, lse = merge_attention(torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[0.0], [0.0]]))
>>> out, lse
(tensor([[3.]]), tensor([0.6931]))
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of all parts; outs and lses are lists, or tensors with the parts in front."""
    dtype = outs[0].dtype
    part_lse = torch.stack(list(lses))
    part_out = torch.stack(list(outs)).to(part_lse.dtype)

    absent = part_lse == -math.inf
    empty = absent.all(dim=0)
    # Any number will do where no part has a key: softmax of -inf alone is NaN.
    part_lse = torch.where(empty, 0.0, part_lse)
    weights = torch.where(absent, 0.0, torch.softmax(part_lse, dim=0))
    out = (weights.unsqueeze(-1) * torch.where(absent.unsqueeze(-1), 0.0, part_out)).sum(dim=0)
    lse = torch.where(empty, -math.inf, torch.logsumexp(part_lse, dim=0))
    return out.to(dtype), lse
