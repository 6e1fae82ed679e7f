"""Layer normalization of rows; the kernels are _norm.py's."""

from torch import Tensor

from . import _norm
from ._register import operator


@operator("out", "mean", "rstd")
def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, mean, rstd = _norm.forward(input, None, weight, bias, eps, 0.0, None, rms=False)
    return out, mean, rstd


@operator("d_input", "d_weight", "d_bias")
def layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
    wide_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    d_input, _, d_weight, d_bias = _norm.backward(
        grad, None, input, weight, mean, rstd, 0.0, None, weight_grad, bias_grad, wide_bias
    )
    return d_input, d_weight, d_bias
