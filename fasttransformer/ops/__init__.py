"""The public functions: argument checks, autocast, the choice of a backend, and autograd."""

from .linear_add import linear_add
from .linear_add_layer_norm import linear_add_layer_norm
from .linear_add_rms_norm import linear_add_rms_norm
from .softmax import log_softmax, softmax

__all__ = [
    "linear_add",
    "linear_add_layer_norm",
    "linear_add_rms_norm",
    "log_softmax",
    "softmax",
]
