"""Triton's interpreter made to round as devices do, for ``fasttransformer check`` and the tests.

Where compiled kernels round float32 to bfloat16 to the nearest, the interpreter (Triton 3.6 to 3.9)
cuts the lower bits off, which is twice the error, and with one sign. ``round_as_devices`` puts the
device's rounding in its place; conversions between the two types are also ten times faster so.
"""

from __future__ import annotations

from typing import Any

import torch


def round_as_devices() -> None:
    """Holds for the whole process.

    Raises:
        ImportError: triton is not installed.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = getattr(interpreter, "_convert_float", None)
    if convert is None or getattr(convert, "rounds", False):
        return

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
            return numbers.to(torch.bfloat16).view(torch.uint16).numpy().reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32).reshape(data.shape)
        return convert(data, source, target, mode)

    rounding.rounds = True  # type: ignore[attr-defined]
    interpreter._convert_float = rounding
