"""The element-wise middle of a feed-forward block, forward and backward.

    out = act(x), or gated out = act(gate) · up of the halves of a row
    dx = g · act′(x)        d_gate = g · up · act′(gate), d_up = g · act(gate)

with dropout of ``out``, and of ``g`` by the same mask. No activation leaves dropout alone.

A program owns a tile of TILE results: of several short rows, or of a stretch of one. Contiguous
rows without halves are one row. Bound: memory bandwidth (each number is read and written once).
Sources: GELU: Hendrycks and Gimpel, 2016 (arXiv:1606.08415); gates: Shazeer, GLU Variants Improve
Transformer, 2020 (arXiv:2002.05202).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ._device import keep_mask, keep_of
from ._matmul import ACTIVATIONS, activate
from ._norm import row_stride
from ._register import operator

# 8 results a thread: one 16-byte load of each array in 16 bits, two in float32. Not measured.
TILE, WARPS = 1024, 4
#: Codes of gates in operators, after those of ACTIVATIONS, and what each gate applies.
GATES = {5: "silu", 6: "gelu"}


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act′(x), also where x² is infinite; an infinite x gives NaN, as in torch."""
    if ACTIVATION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        d += x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        # Of sigmoid(z) and 1 − sigmoid(z) the smaller one comes from the exponential: a difference
        # from 1 would lose it, and the slope multiplies it by up to x³.
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        square = tl.minimum(x * x, 400.0)  # beyond, the product of the two is 0 long since
        inner = 1.5957691216057308 * (1.0 + 0.134145 * square)
        d = tl.where(z < 0.0, smaller, larger) + x * (larger * smaller) * inner
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        d = s * (1.0 + x * (1.0 - s))
    return d


@triton.jit
def _tile(rows, features, column_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's rows, columns, and what of it lies inside."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < features)


@triton.jit
def _dropped(x, seed_ptr, position, threshold, keep_scale, DROPOUT: tl.constexpr):
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), position, threshold)
        x = tl.where(keep, x * keep_scale, 0.0)
    return x


@triton.jit
def _forward(
    x_ptr, out_ptr, seed_ptr, rows, features, x_stride, column_tiles, threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, features, column_tiles, ROWS, BLOCK)
    x_ptr += row * x_stride + column
    y = activate(tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x_ptr + features, mask=inside, other=0.0).to(tl.float32)
    at = row * features + column
    y = _dropped(y, seed_ptr, at, threshold, keep_scale, DROPOUT)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, x_ptr, d_ptr, seed_ptr, rows, features, grad_stride, x_stride, column_tiles,
    threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, features, column_tiles, ROWS, BLOCK)
    x_ptr += row * x_stride + column
    g = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = _dropped(g, seed_ptr, row * features + column, threshold, keep_scale, DROPOUT)
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    kind = d_ptr.dtype.element_ty
    if GATED:
        up = tl.load(x_ptr + features, mask=inside, other=0.0).to(tl.float32)
        d_ptr += row * (2 * features) + column
        tl.store(d_ptr, (g * up * slope(x, ACTIVATION)).to(kind), mask=inside)
        tl.store(d_ptr + features, (g * activate(x, ACTIVATION)).to(kind), mask=inside)
    else:
        if ACTIVATION == "relu":  # an infinite gradient times 0 would be NaN
            d = tl.where(x <= 0.0, 0.0, g)
        elif ACTIVATION == "":
            d = g
        else:
            d = g * slope(x, ACTIVATION)
        tl.store(d_ptr + row * features + column, d.to(kind), mask=inside)


def _shape(x: Tensor, activation: int, contiguous: bool) -> tuple[int, int, int]:
    """(rows, results of a row, row stride)."""
    rows, features = math.prod(x.shape[:-1]), x.shape[-1]
    if activation in GATES:
        return rows, features // 2, row_stride(x)
    if contiguous and row_stride(x) == features:
        return 1, rows * features, rows * features
    return rows, features, row_stride(x)


def _launch(features: int) -> tuple[int, int, int]:
    """(rows of a tile, columns of a tile, tiles of a row)."""
    block = min(TILE, max(16, triton.next_power_of_2(features)))
    return TILE // block, block, triton.cdiv(features, block)


def _name_of(activation: int) -> str:
    if activation in GATES:
        return GATES[activation]
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation: no activation has the code {activation}")
    return ACTIVATIONS[activation]


@operator()
def activation(
    input: Tensor, activation: int, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    name, gated = _name_of(activation), activation in GATES
    out = input.new_empty((*input.shape[:-1], input.shape[-1] // 2 if gated else input.shape[-1]))
    if out.numel() == 0:
        return out
    rows, features, stride = _shape(input, activation, True)
    per_tile, block, column_tiles = _launch(features)
    _forward[(triton.cdiv(rows, per_tile) * column_tiles,)](
        input, out, seed, rows, features, stride, column_tiles,
        *keep_of(dropout_p),
        ACTIVATION=name, GATED=gated, DROPOUT=seed is not None, ROWS=per_tile,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return out


@operator()
def activation_backward(
    grad: Tensor, input: Tensor, activation: int, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    name, gated = _name_of(activation), activation in GATES
    d_input = input.new_empty(input.shape)
    if d_input.numel() == 0:
        return d_input
    rows, features, stride = _shape(input, activation, row_stride(grad) == grad.shape[-1])
    grad_stride = features if rows == 1 else row_stride(grad)
    per_tile, block, column_tiles = _launch(features)
    _backward[(triton.cdiv(rows, per_tile) * column_tiles,)](
        grad, input, d_input, seed, rows, features, grad_stride, stride, column_tiles,
        *keep_of(dropout_p),
        ACTIVATION=name, GATED=gated, DROPOUT=seed is not None, ROWS=per_tile,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return d_input
