"""Which row of a tile table a device takes."""

from __future__ import annotations

import functools
import os

import torch


def family(tensor: torch.Tensor) -> str:
    """One of "sm_90", "sm_80", "small" (shared memory of 99 KB or less), "hip", "interpreter"."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return _family(tensor.get_device())


@functools.cache
def _family(index: int) -> str:
    from triton.runtime import driver

    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    if target.backend == "cuda" and target.arch in (90, 100, 103):
        return "sm_90"
    if target.backend == "cuda" and target.arch in (80, 87):
        return "sm_80"
    return "small"
