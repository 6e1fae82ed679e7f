"""Linear, OutputProjection, FeedForward, Softmax and Embedding on our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._activation import activated
from ..ops.embedding import embedding
from ..ops.linear_add import ACTIVATIONS, linear_add
from ..ops.softmax import softmax
from ..reference.feed_forward import GATES
from ._drop_in import DropIn
from ._fallback import record
from ._plain import kernels_take, parameter, plain_part, run_torchs
from ._project import project_add, project_add_norm
from .norms import NORM_FORWARDS, LayerNorm, RMSNorm, checked_dropout


class Linear(DropIn, nn.Linear):
    r"""Drop-in :class:`torch.nn.Linear`: :math:`y = x W^\top + b`.

    Input (..., in_features), output (..., out_features), in the input's dtype.

    Raises:
        TypeError: dtypes of input, weight and bias differ outside autocast.
        RuntimeError: the last dimension is not in_features, as in torch.

    >>> import torch, fasttransformer as ft
    >>> ft.nn.Linear(3, 2)(torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        if not kernels_take(nn.Linear, input, weight, bias):
            return run_torchs(self, super().forward, input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            return super().forward(input)  # raises torch's error; heads are not for this module
        return linear_add(input, weight, bias)


#: The forwards that reading a linear layer's parameters stands for.
LINEAR_FORWARDS = (nn.Linear.forward, Linear.forward)


def activated_linear(linear: nn.Module, x: Tensor, activation: str, dropout_p: float) -> Tensor:
    """dropout(act(linear(x))), fused unless the activation has a gate or there is more to
    ``linear`` than its weight and bias (an adapter, a hook)."""
    if activation in GATES or not plain_part(linear, LINEAR_FORWARDS):
        return activated(linear(x), activation, dropout_p)
    weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
    return linear_add(x, weight, bias, activation=activation, dropout_p=dropout_p)


class Softmax(DropIn, nn.Softmax):
    r"""Drop-in :class:`torch.nn.Softmax`: :math:`y_i = e^{x_i} / \sum_j e^{x_j}` over ``dim``.

    Any shape and float dtype, output the same; without ``dim``, or of integers, torch's own runs.

    Raises:
        ValueError: ``dim`` that the input doesn't have.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867).

    >>> import torch, fasttransformer as ft
    >>> ft.nn.Softmax(dim=-1)(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape; the entries along ``dim`` sum to one."""
        if not kernels_take(nn.Softmax, input):
            return run_torchs(self, super().forward, input)
        if self.dim is None:
            record(self, "dim is None")
            return super().forward(input)
        return softmax(input, self.dim)


class Embedding(DropIn, nn.Embedding):
    r"""Drop-in :class:`torch.nn.Embedding`: rows of a table, :math:`y_i = W_{x_i}`.

    Input any shape of integer ids, output (\*, embedding_dim) in the table's dtype. Look-ups of
    ``padding_idx`` give their row no gradient. ``max_norm``, ``scale_grad_by_freq`` and ``sparse``
    run torch's own look-up; :func:`fasttransformer.nn.fallbacks` says so.

    Raises:
        TypeError: ids that are no integers.
        ValueError: an id outside the table, in compiled graphs too.

    >>> import torch, fasttransformer as ft
    >>> ft.nn.Embedding(10, 3)(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to (\\*input.shape, embedding_dim)."""
        weight = parameter(self, "weight")
        if not kernels_take(nn.Embedding, weight, input):
            return run_torchs(self, super().forward, input)
        reason = self._why_not()
        if reason is not None:
            record(self, reason)
            return super().forward(input)
        return embedding(input, weight, padding_idx=self.padding_idx)

    def _why_not(self) -> str | None:
        if self.max_norm is not None:
            return "max_norm, which renormalizes rows in place"
        if self.scale_grad_by_freq:
            return "scale_grad_by_freq"
        if self.sparse:
            return "sparse gradients"
        return None


class OutputProjection(nn.Linear):
    r"""The end of a block: linear layer, residual sum and, when asked for, norm, in one kernel.

    .. math:: s = r + \text{dropout}(x W^\top + b), \qquad y = \text{norm}(s)

    Called with (input, residual): input (..., in_features), or attention's own output (B, H, L, D)
    with H·D = in_features, whose heads are read in place; residual (..., out_features). Returns the
    sum, or (normed, summed) with a norm, in the input's dtype; the statistics are float32.

    Args:
        in_features, out_features, bias: as for :class:`torch.nn.Linear`.
        norm: None, ``"layer"`` or ``"rms"``; its parameters are in the submodule ``norm``.
        eps: the norm's.
        dropout: probability, in [0, 1), of dropping an element of the product in training.

    Raises:
        TypeError: dtypes differ outside autocast.
        ValueError: another norm; dropout outside [0, 1); shapes that don't fit.

    Source: the block of Vaswani et al., 2017 (arXiv:1706.03762), sections 3.1 and 3.2.2.

    >>> import torch, fasttransformer as ft
    >>> projection = ft.nn.OutputProjection(8, 6, norm="layer")
    >>> heads, residual = torch.randn(2, 4, 5, 2), torch.randn(2, 5, 6)
    >>> normed, summed = projection(heads, residual)
    >>> normed.shape, sorted(projection.state_dict())
    (torch.Size([2, 5, 6]), ['bias', 'norm.bias', 'norm.weight', 'weight'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        norm: str | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if norm not in (None, "layer", "rms"):
            raise ValueError(
                f"OutputProjection: norm is {norm!r}; it must be None, 'layer' or 'rms'"
            )
        self.dropout = checked_dropout("OutputProjection", dropout)
        self.norm: nn.Module | None = None
        if norm is not None:
            kind = LayerNorm if norm == "layer" else RMSNorm
            self.norm = kind(out_features, eps=eps, device=device, dtype=dtype)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """The sum, or (normed, summed)."""
        if input.dim() == 4 and residual.dim() == 3 and input.shape[1] == 1:
            input = input.squeeze(1)  # one head: rank alone would not say that these are heads
        p = self.dropout if self.training else 0.0
        if self.norm is None:
            return project_add(input, self.weight, self.bias, residual, p)
        if not plain_part(self.norm, NORM_FORWARDS):
            summed = project_add(input, self.weight, self.bias, residual, p)
            return self.norm(summed), summed
        return project_add_norm(input, self.weight, self.bias, residual, self.norm, p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class FeedForward(nn.Module):
    r"""The position-wise feed-forward block.

    .. math:: y = \text{dropout}(\phi(x W_1^\top + b_1))\, W_2^\top + b_2

    or, gated, :math:`\phi(g) \odot u` in place of :math:`\phi`, with :math:`g, u` the halves of
    :math:`x W_1^\top + b_1`, the gate's rows first. Input and output (..., d_model), in the input's
    dtype.

    Args:
        d_model: features in and out.
        dim_feedforward: hidden features.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, or with a gate
            ``"swiglu"`` (silu), ``"geglu"`` (gelu).
        bias: whether the two linear layers have one.
        dropout: probability, in [0, 1), of dropping a hidden feature in training.

    Raises:
        ValueError: another activation; dropout outside [0, 1); shapes that don't fit.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.3; gates: Shazeer, 2020 (2002.05202).

    >>> import torch, fasttransformer as ft
    >>> block = ft.nn.FeedForward(8, 32, "swiglu")
    >>> block(torch.randn(2, 5, 8)).shape, block.linear1.weight.shape
    (torch.Size([2, 5, 8]), torch.Size([64, 8]))
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: str = "gelu",
        *,
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS and activation not in GATES:
            raise ValueError(
                f"FeedForward: activation is {activation!r}; it must be one of "
                f"{', '.join((*ACTIVATIONS, *GATES))}"
            )
        rows = 2 * dim_feedforward if activation in GATES else dim_feedforward
        self.activation = activation
        self.dropout = checked_dropout("FeedForward", dropout)
        self.linear1 = Linear(d_model, rows, bias, device, dtype)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model) to (..., d_model)."""
        return self.linear2(self.hidden(input))

    def hidden(self, input: Tensor) -> Tensor:
        """What enters the second linear layer, (..., dim_feedforward): for blocks that fuse that
        layer with what follows it."""
        p = self.dropout if self.training else 0.0
        return activated_linear(self.linear1, input, self.activation, p)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
