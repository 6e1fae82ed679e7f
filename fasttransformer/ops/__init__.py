"""The public functions: argument checks, autocast, the choice of a backend, and autograd."""

from .softmax import log_softmax, softmax

__all__ = [
    "log_softmax",
    "softmax",
]
