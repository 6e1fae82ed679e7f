"""The public functions: argument checks, autocast, the choice of a backend, and autograd."""

from .attention import attention, scaled_dot_product_attention
from .softmax import log_softmax, softmax

__all__ = [
    "attention",
    "log_softmax",
    "scaled_dot_product_attention",
    "softmax",
]
