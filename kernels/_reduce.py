"""Sum of partial results over their first dimension, in a fixed order.

The second half of every sum over rows, tiles or heads in these kernels: the first half writes what
each program or slice has (float32), this adds it up. No atomics, so the result is the same from
run to run. Sums are float64, where the device has it: a single element summed in float32 in another
order than torch's may be several rounding steps off. A program owns a strip of columns. Bound:
memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

# Narrow strips, so that a weight gradient of 768 columns still gives 24 programs; not measured.
ROWS, COLUMNS = 64, 32


@triton.jit
def _sum_partials(
    partial_ptr,
    out_ptr,
    partials,
    columns,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Column sums of (partials, columns), always in the same order."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(0, partials, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < partials)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial_ptr + at, mask=inside, other=0.0).to(ACC)
    value = tl.sum(total, axis=0).to(tl.float32)  # the interpreter has no float64 → bfloat16
    tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=column < columns)


def sum_dtype(x: Tensor) -> tl.dtype:
    """What to sum in: Intel's client GPUs have no float64."""
    return tl.float32 if x.device.type == "xpu" else tl.float64


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """out[...] = partial[:, ...].sum(0), in out's dtype; both contiguous."""
    columns = out.numel()
    _sum_partials[(triton.cdiv(columns, COLUMNS),)](
        partial,
        out,
        partial.shape[0],
        columns,
        ACC=sum_dtype(out),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
