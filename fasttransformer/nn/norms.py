"""LayerNorm and RMSNorm on our kernels, alone and behind a residual sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.add_layer_norm import add_layer_norm
from ..ops.add_rms_norm import add_rms_norm
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ._drop_in import DropIn
from ._plain import kernels_take, parameter, run_torchs


class LayerNorm(DropIn, nn.LayerNorm):
    r"""Drop-in :class:`torch.nn.LayerNorm`: same constructor, call and ``state_dict``.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot \gamma + \beta

    Mean and variance are over the last ``len(normalized_shape)`` dimensions, in float32 for 16-bit
    inputs. Input and output (..., \*normalized_shape), in the input's dtype, whatever the weights'.

    Raises:
        TypeError: an input that is not floating point.
        ValueError: an input whose shape does not end in ``normalized_shape``.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450).

    >>> import torch, fasttransformer as ft
    >>> ft.nn.LayerNorm(2)(torch.tensor([[1.0, 3.0]])).round()
    tensor([[-1.,  1.]], grad_fn=<RoundBackward0>)
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., \\*normalized_shape) normalized."""
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        if not kernels_take(nn.LayerNorm, input, weight, bias):
            return run_torchs(self, super().forward, input)
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(DropIn, nn.RMSNorm):
    r"""Drop-in :class:`torch.nn.RMSNorm`: same constructor, call and ``state_dict``.

    .. math:: y = \frac{x}{\sqrt{\overline{x^2} + \epsilon}} \odot \gamma

    ``eps=None`` is the machine epsilon of the dtype that is computed in, float32 or float64.
    Input and output (..., \*normalized_shape), in the input's dtype.

    Raises:
        TypeError, ValueError: as :class:`LayerNorm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

    >>> import torch, fasttransformer as ft
    >>> ft.nn.RMSNorm(2, elementwise_affine=False)(torch.tensor([[3.0, 3.0]]))
    tensor([[1., 1.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., \\*normalized_shape) normalized."""
        weight = parameter(self, "weight")
        if not kernels_take(nn.RMSNorm, x, weight):
            return run_torchs(self, super().forward, x)
        return rms_norm(x, self.normalized_shape, weight, self.eps)


#: The forwards that reading a norm's parameters stands for.
LAYER_NORM_FORWARDS = (nn.LayerNorm.forward, LayerNorm.forward)
NORM_FORWARDS = (*LAYER_NORM_FORWARDS, nn.RMSNorm.forward, RMSNorm.forward)


class AddLayerNorm(nn.LayerNorm):
    r"""Residual sum and layer norm in one pass over memory.

    .. math:: s = r + \text{dropout}(x), \qquad y = \text{LayerNorm}(s)

    Called with (input, residual), both (..., \*normalized_shape); returns (normed, summed). A
    post-norm block goes on with ``normed``; a pre-norm block carries ``summed`` on as its residual.
    Both are in the inputs' dtype.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as for :class:`torch.nn.LayerNorm`.
        dropout: probability, in [0, 1), of dropping an element of ``input`` in training.

    Raises:
        TypeError: inputs that are not floating point, or of two dtypes outside autocast.
        ValueError: shapes that differ or don't end in ``normalized_shape``; dropout outside [0, 1).

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450); the residual
    sum: He et al., 2016 (1512.03385).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.nn.AddLayerNorm(2)(torch.ones(1, 2), torch.tensor([[0.0, 2.0]]))
    >>> summed.tolist()
    [[1.0, 3.0]]
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = checked_dropout("AddLayerNorm", dropout)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(normed, summed)."""
        return add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class AddRMSNorm(nn.RMSNorm):
    r"""Residual sum and RMS norm in one pass over memory.

    .. math:: s = r + \text{dropout}(x), \qquad y = \text{RMSNorm}(s)

    Called with (input, residual), both (..., \*normalized_shape); returns (normed, summed), both in
    the inputs' dtype.

    Args:
        normalized_shape, eps, elementwise_affine: as for :class:`torch.nn.RMSNorm`.
        dropout: probability, in [0, 1), of dropping an element of ``input`` in training.

    Raises:
        TypeError, ValueError: as :class:`AddLayerNorm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

    >>> import torch, fasttransformer as ft
    >>> normed, summed = ft.nn.AddRMSNorm(2)(torch.ones(1, 2), torch.ones(1, 2))
    >>> summed.tolist()
    [[2.0, 2.0]]
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout = checked_dropout("AddRMSNorm", dropout)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(normed, summed)."""
        return add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def checked_dropout(name: str, dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{name}: dropout is {dropout}; it must be in [0, 1)")
    return float(dropout)
