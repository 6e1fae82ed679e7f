"""What the output layer's operations share: logits in float32, a piece of the rows at a time.

Tensor cores want large products, and a whole piece of logits is one. It goes to memory and is read
once or twice by the kernels of the three operations; with C features a logit costs 2C operations
and some 12 bytes, so from C = 1024 on the product bounds (H100: 660 TFLOP/s, 3 TB/s).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _matmul

#: Logits of a piece: 256 MB. Reasoned, not measured: 512 rows of 128k classes fill a wave of tiles.
PIECE = 1 << 26


def pieces(rows: int, classes: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of each piece."""
    height = max(1, PIECE // max(1, classes))
    for first in range(0, rows, height):
        yield first, min(rows, first + height)


def write_logits(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = input @ weightᵀ + bias, for rows of two dimensions."""
    rows, features = input.shape
    steps = (input.stride(0), 1)
    _matmul.matmul(
        input, weight, out, rows, weight.shape[0], features, steps,
        (weight.stride(1), weight.stride(0)), bias=bias,
    )  # fmt: skip


def new_logits(input: Tensor, rows: int, classes: int) -> Tensor:
    """Room for a piece's logits."""
    return torch.empty((rows, classes), dtype=torch.float32, device=input.device)
