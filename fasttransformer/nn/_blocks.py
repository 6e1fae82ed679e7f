"""What the encoder and decoder layers are made of: which submodules may be fused, and the fusions.

torch's layers call their submodules one by one, so hooks on them fire, and whatever a user put in
their place runs. The fused path reads their parameters instead. So it is taken only while every
submodule that it would bypass is plain: of the very class that torch or this package builds
(parametrized, quantized and wrapped ones have a class of their own) and without hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from ..ops.linear_add import linear_add
from .attention import MultiheadAttention
from .linear import Linear
from .norms import LayerNorm, RMSNorm

_ATTENTIONS = (nn.MultiheadAttention, MultiheadAttention)
_LINEARS = (nn.Linear, Linear, NonDynamicallyQuantizableLinear)
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)
_RMS_NORMS = (nn.RMSNorm, RMSNorm)
_DROPOUTS = (nn.Dropout,)
_PLAIN: dict[str, tuple[type, ...]] = {
    "self_attn": _ATTENTIONS,
    "multihead_attn": _ATTENTIONS,
    "linear1": _LINEARS,
    "linear2": _LINEARS,
    "norm1": _LAYER_NORMS + _RMS_NORMS,
    "norm2": _LAYER_NORMS + _RMS_NORMS,
    "norm3": _LAYER_NORMS + _RMS_NORMS,
    "dropout": _DROPOUTS,
    "dropout1": _DROPOUTS,
    "dropout2": _DROPOUTS,
    "dropout3": _DROPOUTS,
}


def why_not_fused(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why the named submodules must be called one by one, or None."""
    if _has_any_global_hook():
        return "global module hooks: submodules are called one by one"
    modules: dict[str, Any] = layer._modules
    for name in names:
        module: Any = modules.get(name)
        if type(module) not in _PLAIN[name]:
            return f"{name} is a {type(module).__name__}: submodules are called one by one"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return f"{name} has hooks: submodules are called one by one"
        if name.startswith("norm") and len(module.normalized_shape) != 1:
            return f"{name} normalizes over more than one dimension"
        if name.startswith("dropout") and module.training and module.p >= 1.0:
            return f"{name} drops everything"
    return None


def dropout_p(module: nn.Dropout) -> float:
    """The probability in force; a single Dropout may be in another mode than its layer."""
    return module.p if module.training else 0.0


#: Activations that linear_add applies while the product is in registers.
_FUSED: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}


def fused_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """linear_add's name of an activation function or module, or None: then it is called."""
    kind = type(activation)
    if kind is nn.ReLU or kind is nn.SiLU or kind is nn.GELU:
        if activation._forward_hooks or activation._forward_pre_hooks:  # type: ignore[attr-defined]
            return None
        if kind is nn.ReLU:
            return "relu"
        if kind is nn.SiLU:
            return "silu"
        return "gelu" if activation.approximate == "none" else "gelu_tanh"  # type: ignore[attr-defined]
    if isinstance(activation, nn.Module):
        return None
    try:
        return _FUSED.get(activation)
    except TypeError:  # a callable that can't be hashed
        return None


def hidden(x: Tensor, layer: Any) -> Tensor:
    """dropout(activation(linear1(x))) of a layer's feed-forward."""
    modules = layer._modules
    linear1, dropout = modules["linear1"], modules["dropout"]
    activation = layer.activation
    fused = fused_activation(activation)
    h = linear_add(x, linear1.weight, linear1.bias, activation=fused)
    if fused is None:
        h = activation(h)
    return dropout(h) if dropout.training and dropout.p > 0.0 else h
