"""Dropout alone. torch draws a double for each element on the CPU, which takes three times as long
as the rest of it; here four elements share one draw of 64 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """As :func:`torch.nn.functional.dropout` in training, from torch's generator. On the CPU ``p``
    is taken to the nearest 1/65536, and what is kept is scaled by the true probability."""
    plain = x.is_cpu and x.is_floating_point() and not torch.compiler.is_compiling()
    if not plain or torch._C._are_functorch_transforms_active():
        return F.dropout(x, p)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[:count].view(x.shape)
    keep = (draws >= dropped - _LEVELS // 2).to(x.dtype)
    return x * keep.mul_(_LEVELS / (_LEVELS - dropped))
