"""What a fused forward asks of the parts that it reads instead of calling: is there more to them?

Used by the layers here and by every target of :func:`fasttransformer.swap`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import GELU, Module, ReLU, SiLU


def addition(module: Module) -> str | None:
    """What this very instance has that its class's forward does not do, in words, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has a hook"
    if "forward" in module.__dict__:
        return "has a replaced forward"
    return None


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: What ``linear_add(activation=)`` calls the functions and module classes that people use; classes
#: of transformers by their path, so that it need not be there.
_ACTIVATIONS: dict[object, str] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    ReLU: "relu",
    SiLU: "silu",
}
_ACTIVATION_PATHS = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(activation: object) -> str | None:
    """``linear_add``'s name for an activation given as a function or module, None if it has none.

    >>> activation_name(GELU(approximate="tanh"))
    'gelu_tanh'
    """
    if not isinstance(activation, Module):
        try:
            return _ACTIVATIONS.get(activation)
        except TypeError:  # not hashable
            return None
    if addition(activation) is not None:
        return None
    cls = type(activation)
    if cls is GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(cls) or _ACTIVATION_PATHS.get(path_of(cls))
