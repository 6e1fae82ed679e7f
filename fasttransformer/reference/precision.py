"""The precision that the reference computes in.

16-bit inputs are widened to float32, worked on there, and rounded once at the end; float32 and
float64 stay what they are. So the reference in float64 is exact to about 1e-15, and a 16-bit
matmul on a CPU without 16-bit instructions runs at float32's speed.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for everything narrower.

    >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    >>> compute_dtype(torch.zeros(1, dtype=torch.float64))
    torch.float64
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def scale_for_squares(x: Tensor, dims: list[int], eps: float) -> Tensor | float:
    """What rows are multiplied by before their squares are summed: a power of 2, which cancels.

    It is 1 but for rows whose squares would overflow, or vanish where eps is next to nothing too.
    Those are brought near 1. To autograd it is a constant.

    >>> scale_for_squares(torch.tensor([[1.0], [2.0**70]]), [-1], 1e-5).log2()
    tensor([[  0.],
            [-70.]])
    """
    if x.numel() == 0:
        return 1.0
    far, most = (2.0**500, 1022) if x.dtype == torch.float64 else (2.0**50, 126)
    largest = x.detach().abs().amax(dims, keepdim=True)
    extreme = largest > far
    if eps < far**-2:
        extreme = extreme | ((largest < 1 / far) & (largest > 0))
    power = -torch.log2(largest).floor().clamp(-0.8 * most, most)
    return torch.where(extreme & largest.isfinite(), torch.exp2(power), 1.0)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype that a and b have, under autocast too, which would round them to 16 bits.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     matmul(torch.eye(2), torch.eye(2)).dtype
    torch.float32
    """
    with without_autocast(a):
        return a @ b


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Within, what runs on the tensor's device keeps its dtype, under autocast too."""
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type):  # meta tensors
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
