"""The public functions: argument checks, autocast, the choice of a backend, and autograd."""

from .add_layer_norm import add_layer_norm
from .add_rms_norm import add_rms_norm
from .attention import attention, scaled_dot_product_attention
from .layer_norm import layer_norm
from .linear_add import linear_add
from .linear_add_layer_norm import linear_add_layer_norm
from .linear_add_rms_norm import linear_add_rms_norm
from .rms_norm import rms_norm
from .softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "layer_norm",
    "linear_add",
    "linear_add_layer_norm",
    "linear_add_rms_norm",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
