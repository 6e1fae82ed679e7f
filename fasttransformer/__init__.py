"""Fused Transformer kernels for CPUs and GPUs, as functions and drop-in ``nn.Module``s.

>>> import torch, fasttransformer as ft
>>> q = k = v = torch.randn(1, 2, 5, 8)
>>> ft.softmax(q @ k.mT, is_causal=True).shape
torch.Size([1, 2, 5, 5])
"""

from . import _checkout

_checkout.install()

from . import _flops, nn, ops  # noqa: E402, F401  (torch's table of formulas)
from .backends import backends, explain, use_backend  # noqa: E402
from .ops import *  # noqa: E402, F403
from .swap import restore, swap  # noqa: E402

__all__ = ["backends", "explain", "nn", "restore", "swap", "use_backend", *ops.__all__]
__version__ = "0.1.0"
