"""Cross entropy of a linear layer's output, and its gradients, without the logits of all rows.

    L = input @ weightᵀ + bias,  G = ∂loss/∂L,  d_input = G @ weight,  d_weight = Gᵀ @ input

A piece of the rows at a time: the product writes float32 logits; a program per row reads them for
the maximum and the sums (online), and, where gradients are wanted, once more to write G in the
input's dtype; two products take G, of which d_weight's adds to a float32 sum over the pieces. With
the loss that is three products, in a backward pass of its own four. Rows that are left out cost
their share of the products, since counting the others would wait for the queue. Bound: the
products. Sources: Hsu et al., Liger Kernel, 2024 (arXiv:2410.10989), section 3.2; Milakov and
Gimelshein, Online normalizer calculation for softmax, 2018.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _matmul
from ._output_layer import new_logits, pieces, write_logits
from ._register import operator

BLOCK, WARPS = 4096, 8  # classes of a step; not measured


@triton.jit
def _rows(
    x_ptr,
    target_ptr,
    weight_ptr,
    grad_ptr,
    losses_ptr,
    statistics_ptr,
    g_ptr,
    classes,
    grad_step,
    ignore_index,
    smoothing,
    weight_sum_ptr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    FORWARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * classes
    g_ptr += row * classes
    statistics_ptr += row * 4
    lane = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    weight_sum = tl.load(weight_sum_ptr)
    if target == ignore_index:
        if FORWARD:
            tl.store(losses_ptr + row, 0.0)
            tl.store(statistics_ptr + tl.arange(0, 4), tl.zeros([4], tl.float32))
        if GRADIENT:
            zeros = tl.zeros([BLOCK], tl.float32).to(g_ptr.dtype.element_ty)
            for start in range(0, classes, BLOCK):
                tl.store(g_ptr + start + lane, zeros, mask=start + lane < classes)
    else:
        hit = tl.load(x_ptr + target)
        target_weight = 1.0
        if HAS_WEIGHT:
            target_weight = tl.load(weight_ptr + target).to(tl.float32)
        if FORWARD:
            tops = tl.full([BLOCK], float("-inf"), tl.float32)
            totals = tl.zeros([BLOCK], tl.float32)
            # Σ w · (x − about): of small terms, so that the sum keeps its digits.
            about = tl.where(tl.abs(hit) < float("inf"), hit, 0.0)
            shares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, classes, BLOCK):
                column = start + lane
                x = tl.load(x_ptr + column, mask=column < classes, other=float("-inf"))
                new = tl.where(x > tops, x, tops)  # a NaN is no maximum
                base = tl.where(new == float("-inf"), 0.0, new)
                totals = totals * tl.exp(tops - base) + tl.exp(x - base)
                tops = new
                if SMOOTH:
                    share = x - about
                    if HAS_WEIGHT:
                        w = tl.load(weight_ptr + column, mask=column < classes, other=0.0)
                        share *= w.to(tl.float32)
                    shares += tl.where(column < classes, share, 0.0)
            top = tl.max(tops, axis=0)
            base = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(totals * tl.exp(tops - base), axis=0)
            log_sum = tl.log(total)
            # Less the maximum first: what is left is exact where it is small. Of −inf alone: NaN.
            loss = target_weight * (log_sum - (hit - top))
            if SMOOTH:
                even = weight_sum * (log_sum + (top - about)) - tl.sum(shares, axis=0)
                loss = (1.0 - smoothing) * loss + smoothing / classes * even
            tl.store(losses_ptr + row, loss)
            tl.store(statistics_ptr, top)
            tl.store(statistics_ptr + 1, log_sum)
            tl.store(statistics_ptr + 2, target_weight)
            tl.store(statistics_ptr + 3, weight_sum)
        else:
            top = tl.load(statistics_ptr)
            log_sum = tl.load(statistics_ptr + 1)
        if GRADIENT:
            grad = tl.load(grad_ptr + row * grad_step)
            hot = grad * (1.0 - smoothing) * target_weight
            each = grad * (smoothing / classes)
            scale = hot + each * weight_sum
            for start in range(0, classes, BLOCK):
                column = start + lane
                x = tl.load(x_ptr + column, mask=column < classes, other=0.0)
                g = scale * tl.exp((x - top) - log_sum)
                if HAS_WEIGHT:
                    w = tl.load(weight_ptr + column, mask=column < classes, other=0.0)
                    g -= each * w.to(tl.float32)
                else:
                    g -= each
                g = tl.where(column == target, g - hot, g)
                tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=column < classes)


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    losses: Tensor | None,
    statistics: Tensor,
    grad: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_input, d_weight, d_bias), each of shape (0,) if it is not ``wanted``. With ``losses``,
    they and the statistics are written; without, the statistics are read."""
    (rows, features), classes = input.shape, weight.shape[0]
    d_input = input.new_empty(input.shape if wanted[0] else (0,))
    d_weight = input.new_empty(weight.shape if wanted[1] else (0,))
    d_bias = input.new_empty((classes,) if wanted[2] else (0,))
    if rows == 0 or classes == 0:  # of no classes every row is left out
        if losses is not None:
            losses.zero_()
            statistics.zero_()
        return d_input.zero_(), d_weight.zero_(), d_bias.zero_()
    if class_weight is None:
        weight_sum = torch.full((), float(classes), device=input.device)
    else:
        weight_sum = class_weight.sum(dtype=torch.float32)
    weights = (
        torch.empty(weight.shape, dtype=torch.float32, device=input.device) if wanted[1] else None
    )
    biases = torch.zeros(classes, dtype=torch.float32, device=input.device) if wanted[2] else None
    for first, last in pieces(rows, classes):
        x, ids, height = input[first:last], target[first:last], last - first
        logits = new_logits(input, height, classes)
        write_logits(x, weight, bias, logits)
        g = logits
        if any(wanted) and input.dtype != torch.float32:
            g = input.new_empty((height, classes))
        _rows[(height,)](
            logits, ids, class_weight, grad[first:last],
            logits if losses is None else losses[first:last], statistics[first:last], g, classes,
            grad.stride(0), ignore_index, label_smoothing, weight_sum,
            HAS_WEIGHT=class_weight is not None, SMOOTH=label_smoothing != 0.0,
            FORWARD=losses is not None, GRADIENT=any(wanted), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if wanted[0]:
            _matmul.matmul(
                g, weight, d_input[first:last], height, features, classes, (classes, 1),
                (weight.stride(0), weight.stride(1)), split=True,
            )  # fmt: skip
        if weights is not None:
            # A row that is left out has no gradient, but 0 · NaN would be one.
            x = x.masked_fill((ids == ignore_index)[:, None], 0.0)
            _matmul.matmul(
                g, x, weights, classes, features, height, (1, classes), (x.stride(0), 1),
                residual=weights if first > 0 else None,
            )  # fmt: skip
        if biases is not None:
            part = torch.empty_like(biases)
            _matmul.column_sums(g, part)
            biases += part
    if weights is not None:
        d_weight = weights.to(input.dtype)
    if biases is not None:
        d_bias = biases.to(input.dtype)
    return d_input, d_weight, d_bias


@operator("losses", "statistics", "d_input", "d_weight", "d_bias")
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = input.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=input.device)
    statistics = torch.empty((rows, 4), dtype=torch.float32, device=input.device)
    grad = torch.ones((), dtype=torch.float32, device=input.device)
    if mean and weight.shape[0] > 0:
        kept = target != ignore_index
        if class_weight is None:
            grad = grad / kept.sum()
        else:
            grad = grad / torch.where(kept, class_weight[torch.where(kept, target, 0)], 0).sum()
    gradients = run(
        input, weight, bias, target, class_weight, losses, statistics, grad.expand(rows),
        ignore_index, label_smoothing, (input_grad, weight_grad, bias_grad),
    )  # fmt: skip
    return losses, statistics, *gradients


@operator("d_input", "d_weight", "d_bias")
def linear_cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(
        input, weight, bias, target, class_weight, None, statistics, grad, ignore_index,
        label_smoothing, (input_grad, weight_grad, bias_grad),
    )  # fmt: skip
