"""Sum of partial results over their first dimension, in a fixed order.

The second half of every sum over rows, tiles or heads in these kernels: the first half writes what
each program or slice has (float32), this adds it up. No atomics, so the result is the same from
run to run. A program owns a strip of columns. Bound: memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

# Narrow strips, so that a weight gradient of 768 columns still gives 24 programs; not measured.
ROWS, COLUMNS = 64, 32


@triton.jit
def _sum_partials(
    partial_ptr, out_ptr, partials, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Column sums of (partials, columns), always in the same order."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, partials, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < partials)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
    value = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, value, mask=column < columns)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """out[...] = partial[:, ...].sum(0), in out's dtype; both contiguous."""
    columns = out.numel()
    _sum_partials[(triton.cdiv(columns, COLUMNS),)](
        partial, out, partial.shape[0], columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
