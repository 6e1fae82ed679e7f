"""Linear layer with activation and residual, and its backward; the kernels are _matmul.py's.

    out = dropout(activation(input @ weightᵀ + bias)) + residual
    d_input = grad @ weight,  d_weight = gradᵀ @ input,  d_bias = Σ_rows grad

The backward is that of the linear part: ``grad`` is what reaches it.
"""

import math

import torch
from torch import Tensor

from . import _matmul, _norm
from ._norm import row_stride
from ._register import operator


def output_for(input: Tensor, features: int) -> Tensor:
    """(rows, features), or (batch, sequence, features) of three dimensions and of heads."""
    if input.dim() == 2:
        return input.new_empty((input.shape[0], features))
    return input.new_empty((input.shape[0], input.shape[-2], features))


def operand(name: str, input: Tensor) -> tuple[tuple[int, int], tuple[str, Tensor | None]]:
    """Strides of the rows form of input, or the note that it has heads."""
    if input.dim() == 4:
        return (0, 0), (name, input)
    return (row_stride(input), 1), ("", None)


@operator()
def linear_add(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if not 0 <= activation < len(_matmul.ACTIVATIONS):
        raise ValueError(f"linear_add: no activation has the code {activation}")
    N, K = weight.shape
    out = output_for(input, N)
    M = math.prod(out.shape[:-1])
    if out.numel() == 0:
        return out
    steps, heads = operand("a", input)
    _matmul.matmul(
        input, weight, out, M, N, K, steps, (weight.stride(1), weight.stride(0)), heads, bias,
        residual, _matmul.ACTIVATIONS[activation], dropout=(dropout_p, seed),
    )  # fmt: skip
    return out


@operator("d_input", "d_weight", "d_bias")
def linear_add_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    M, (N, K) = math.prod(grad.shape[:-1]), weight.shape
    d_input = input.new_empty(input.shape if input_grad else (0,))
    d_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    d_bias = weight.new_empty((N if bias_grad else 0,))
    if M == 0 or N == 0:
        return d_input.zero_(), d_weight.zero_(), d_bias.zero_()
    if d_input.numel():
        heads: tuple[str, Tensor | None] = ("c", d_input) if input.dim() == 4 else ("", None)
        _matmul.matmul(
            grad,
            weight,
            d_input,
            M,
            K,
            N,
            (row_stride(grad), 1),
            (weight.stride(0), weight.stride(1)),
            heads,
        )
    if d_weight.numel():
        steps, heads = operand("b", input)
        _matmul.matmul(
            grad, input, d_weight, N, K, M, (1, row_stride(grad)), steps, heads, split=True
        )
    if d_bias.numel():
        _matmul.column_sums(grad, d_bias)
    return d_input, d_weight, d_bias


def linear_add_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    return_sum: bool,
    dropout_p: float,
    seed: Tensor | None,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normed, summed, mean, rstd): one kernel or two, by the rule in _matmul.py."""
    N, K = weight.shape
    normed = output_for(input, N)
    M = math.prod(normed.shape[:-1])
    tile = _matmul.fused_tile(input, M, N)
    if tile is None or M * N == 0:
        summed = linear_add(input, weight, bias, residual, 0, dropout_p, seed)  # no activation
        normed, _, mean, rstd = _norm.forward(
            summed, None, norm_weight, norm_bias, eps, 0.0, None, rms
        )
        return normed, summed if return_sum else summed.new_empty(0), mean, rstd
    summed = torch.empty_like(normed) if return_sum else normed.new_empty(0)
    rstd = input.new_empty((M,), dtype=torch.float32)
    mean = rstd if rms else torch.empty_like(rstd)
    steps, heads = operand("a", input)
    S, E, head_steps = _matmul.heads_of(input)
    _matmul.matmul_norm_kernel[((M + tile.m - 1) // tile.m,)](
        input, weight, bias, residual, seed, norm_weight, norm_bias, normed, summed, mean, rstd, M,
        N, K,
        float(N), steps, (weight.stride(1), weight.stride(0)),
        row_stride(residual), S, E, head_steps, _matmul.keep_of(dropout_p), eps, HEADS=heads[0],
        ALIGNED=E % tile.k == 0, EVEN=K % tile.k == 0, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, DROPOUT=_matmul.dropout_form(seed, N),
        HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
        HAS_SUM=return_sum, RMS=rms, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return normed, summed, mean, rstd
