"""Triton's interpreter made to round as devices do.

Where compiled kernels round float32 to bfloat16 to the nearest, the interpreter (Triton 3.6 to 3.9)
cuts the lower bits off, which is twice the error, and with one sign. ``round_as_devices`` puts the
device's rounding in its place; conversions between the two types are also ten times faster so.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_as_devices() -> None:
    convert = interpreter._convert_float
    if getattr(convert, "rounds", False):
        return

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
            return numbers.to(torch.bfloat16).view(torch.uint16).numpy().reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32).reshape(data.shape)
        return convert(data, source, target, mode)

    rounding.rounds = True
    interpreter._convert_float = rounding
