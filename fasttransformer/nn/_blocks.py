"""What the encoder and decoder layers are made of: which submodules may be fused, and the fusions.

torch's layers call their submodules one by one, so hooks on them fire, and whatever a user put in
their place runs. The fused path reads their parameters instead. So it is taken only while every
submodule that it would bypass is plain: its class's ``forward`` is torch's or ours (quantized and
wrapped ones have their own; parametrized ones don't need it, their parameters are read as
attributes), and it has no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops.linear_add import linear_add
from ._plain import activation_name, called_everywhere, part_reason
from .attention import MultiheadAttention, why_not
from .linear import LINEAR_FORWARDS
from .norms import NORM_FORWARDS

_ATTENTION = (nn.MultiheadAttention.forward, MultiheadAttention.forward)
DROPOUT_FORWARDS = (nn.Dropout.forward,)
#: submodule → the forwards that the fused path stands for
_PLAIN: dict[str, tuple[Callable[..., Any], ...]] = {
    "self_attn": _ATTENTION,
    "multihead_attn": _ATTENTION,
    "linear1": LINEAR_FORWARDS,
    "linear2": LINEAR_FORWARDS,
    "norm1": NORM_FORWARDS,
    "norm2": NORM_FORWARDS,
    "norm3": NORM_FORWARDS,
    "dropout": DROPOUT_FORWARDS,
    "dropout1": DROPOUT_FORWARDS,
    "dropout2": DROPOUT_FORWARDS,
    "dropout3": DROPOUT_FORWARDS,
}
ENCODER = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")
DECODER = (*ENCODER, "multihead_attn", "norm3", "dropout3")


def why_not_fused(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why the named submodules must be called one by one, or None."""
    everywhere = called_everywhere()
    if everywhere is not None:
        return f"{everywhere}: submodules are called one by one"
    modules: dict[str, Any] = layer._modules
    for name in names:
        module: Any = modules.get(name)
        found = part_reason(module, _PLAIN[name])
        if found is not None:
            return f"{name} {found}: submodules are called one by one"
        if name.endswith("attn"):
            reason = why_not(module)
            if reason is not None:
                return reason
        if name.startswith("norm") and len(module.normalized_shape) != 1:
            return f"{name} normalizes over more than one dimension"
        if name.startswith("dropout") and module.training and module.p >= 1.0:
            return f"{name} drops everything"
    return None


def dropout_p(module: nn.Dropout) -> float:
    """The probability in force; a single Dropout may be in another mode than its layer."""
    return module.p if module.training else 0.0


def hidden(x: Tensor, layer: Any) -> Tensor:
    """dropout(activation(linear1(x))) of a layer's feed-forward."""
    modules = layer._modules
    linear1, dropout = modules["linear1"], modules["dropout"]
    activation = layer.activation
    fused = activation_name(activation)
    weight, bias, p = linear1.weight, linear1.bias, dropout_p(dropout)
    if fused is not None:
        return linear_add(x, weight, bias, activation=fused, dropout_p=p)
    h = activation(linear_add(x, weight, bias))
    return dropout(h) if p > 0.0 else h
