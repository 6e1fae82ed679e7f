"""Output projection, residual and RMS norm; the kernels are _matmul.py's and _norm.py's."""

from torch import Tensor

from ._register import operator
from .linear_add import linear_add_norm


@operator("normed", "summed", "rstd")
def linear_add_rms_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    return_sum: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, summed, _, rstd = linear_add_norm(
        input, weight, bias, residual, norm_weight, None, eps, return_sum, dropout_p, seed, rms=True
    )
    return normed, summed, rstd
