"""The k most probable classes of an output layer, and their probabilities.

    x = (input @ weightᵀ + bias) / temperature,   values = exp(x − max x) / Σ exp(x − max x)

The product writes a piece of float32 logits. A program takes a block of a row: its maximum, its sum
about that, and its k largest, one after another; what the blocks of a row found, a few thousand
numbers, is left to torch.topk. An entry is one integer: the logit's bits in order, then the index
from the last to the first, so that no two are equal and of equal logits the lower index comes
first. For a large k all entries are left to torch.topk. Bound: reading the weight for few rows, the
product for many.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, section 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._output_layer import new_logits, pieces, write_logits
from ._register import operator

BLOCK = 2048  # classes of a program; not measured
LISTED = 64  # the largest k that programs select


@triton.jit
def _largest(
    x_ptr,
    tops_ptr,
    sums_ptr,
    entries_ptr,
    classes,
    blocks,
    temperature,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    x = tl.load(x_ptr + row * classes + column, mask=inside, other=float("-inf")) / temperature
    top = tl.max(tl.where(x == x, x, float("-inf")), axis=0)  # a NaN is no maximum
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.where(inside, tl.exp(x - base), 0.0), axis=0)
    tl.store(tops_ptr + row * blocks + block, top)
    tl.store(sums_ptr + row * blocks + block, total)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # −0 is 0
    bits = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    entries = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    least: tl.constexpr = -0x8000000000000000
    entries = tl.where(inside, entries, least)
    if SELECT:
        entries_ptr += (row * blocks + block) * K
        for i in range(K):
            best = tl.max(entries, axis=0)
            tl.store(entries_ptr + i, best)
            entries = tl.where(entries == best, least, entries)
    else:
        tl.store(entries_ptr + row * classes + column, entries, mask=inside)


@operator("values", "indices")
def linear_topk(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    rows, classes = input.shape[0], weight.shape[0]
    values = input.new_empty((rows, k))
    indices = input.new_empty((rows, k), dtype=torch.int64)
    if values.numel() == 0:
        return values, indices
    block = min(BLOCK, max(16, triton.next_power_of_2(classes)))
    blocks = triton.cdiv(classes, block)
    select = k <= LISTED and k < block
    for first, last in pieces(rows, classes):
        height = last - first
        logits = new_logits(input, height, classes)
        write_logits(input[first:last], weight, bias, logits)
        tops = new_logits(input, height, blocks)
        sums = torch.empty_like(tops)
        width = blocks * k if select else classes
        entries = torch.empty((height, width), dtype=torch.int64, device=input.device)
        _largest[(height, blocks)](
            logits, tops, sums, entries, classes, blocks, temperature, K=k, SELECT=select,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
        best = torch.topk(entries, k, dim=1).values
        indices[first:last] = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        bits = (best >> 32).to(torch.int32)
        x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        top = tops.amax(1, keepdim=True)
        total = (sums * torch.exp(tops - top)).sum(1, keepdim=True)
        values[first:last] = torch.exp(x - top) / total
    return values, indices
