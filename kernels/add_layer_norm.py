"""Residual, dropout and layer normalization in one pass; the kernels are _norm.py's."""

from torch import Tensor

from . import _norm
from ._register import operator


@operator("normed", "summed", "mean", "rstd")
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm.forward(input, residual, weight, bias, eps, dropout_p, seed, rms=False)


@operator("d_residual", "d_input", "d_weight", "d_bias")
def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    wide_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm.backward(
        grad_normed, grad_summed, summed, weight, mean, rstd, dropout_p, seed, weight_grad,
        bias_grad, wide_bias,
    )  # fmt: skip
