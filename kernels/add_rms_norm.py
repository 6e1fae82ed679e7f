"""Residual, dropout and root-mean-square normalization in one pass; the kernels are _norm.py's."""

from torch import Tensor

from . import _norm
from ._register import operator


@operator("normed", "summed", "rstd")
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, summed, _, rstd = _norm.forward(
        input, residual, weight, None, eps, dropout_p, seed, rms=True
    )
    return normed, summed, rstd


@operator("d_residual", "d_input", "d_weight")
def add_rms_norm_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_residual, d_input, d_weight, _ = _norm.backward(
        grad_normed, grad_summed, summed, weight, None, rstd, dropout_p, seed, weight_grad, False
    )
    return d_residual, d_input, d_weight
