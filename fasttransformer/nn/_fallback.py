"""Where a module of ours ran torch's own forward instead of our kernels, and why."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import nn

logger = logging.getLogger("fasttransformer.nn")

# Weak keys keep the modules free of extra attributes: pickle, deepcopy and ft.restore see nothing.
_reasons: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()


def record(module: nn.Module, reason: str) -> None:
    """Notes that ``module`` just fell back for ``reason``; logged the first time."""
    if torch.compiler.is_compiling():
        return
    counts = _reasons.setdefault(module, {})
    if reason not in counts:
        logger.info("%s: %s", type(module).__name__, reason)
    counts[reason] = counts.get(reason, 0) + 1


def fallbacks(module: nn.Module) -> dict[str, dict[str, int]]:
    """Qualified name → reason → number of calls, of every part of ``module`` that fell back.

    An empty result after a forward pass says that every module of ours ran its own kernels.
    Calls from inside ``torch.compile`` are not counted.

    >>> import torch, fasttransformer as ft
    >>> layer = ft.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 3, 8)
    >>> _ = layer(x, x, x)
    >>> ft.nn.fallbacks(layer)
    {}
    """
    found = {}
    for name, child in module.named_modules():
        counts = _reasons.get(child)
        if counts:
            found[name] = dict(counts)
    return found
