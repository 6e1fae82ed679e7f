"""Output projection, residual and layer norm; the kernels are _matmul.py's and _norm.py's."""

from torch import Tensor

from ._register import operator
from .linear_add import linear_add_norm


@operator("normed", "summed", "mean", "rstd")
def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    return_sum: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_add_norm(
        input,
        weight,
        bias,
        residual,
        norm_weight,
        norm_bias,
        eps,
        return_sum,
        dropout_p,
        seed,
        rms=False,
    )
