"""Root-mean-square normalization of rows; the kernels are _norm.py's."""

from torch import Tensor

from . import _norm
from ._register import operator


@operator("out", "rstd")
def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    out, _, _, rstd = _norm.forward(input, None, weight, None, eps, 0.0, None, rms=True)
    return out, rstd


@operator("d_input", "d_weight")
def rms_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    d_input, _, d_weight, _ = _norm.backward(
        grad, None, input, weight, None, rstd, 0.0, None, weight_grad, False
    )
    return d_input, d_weight
