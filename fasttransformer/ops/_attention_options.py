"""Checks of attention's options for the operations that take them beside attention itself."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._front import is_float, same_device
from .attention import _ALIGNMENTS, _check_bias, _check_mask, _check_slopes, _check_window


def check_options(
    op: str,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Raises as attention would, for query (batch, heads, q_len, ·), key (batch, ·, kv_len, ·)."""
    if mask is not None:
        _check_mask(op, "mask", mask, query, key)
    if bias is not None:
        _check_bias(op, "bias", bias, query, key)
    if causal_alignment not in _ALIGNMENTS:
        raise ValueError(
            f"{op}: causal_alignment is {causal_alignment!r}; it must be "
            f"{' or '.join(map(repr, _ALIGNMENTS))}"
        )
    _check_window(op, window)
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(
            f"{op}: softcap is {softcap}; it must be a positive finite number, or None"
        )
    if alibi_slopes is not None:
        _check_slopes(op, alibi_slopes, query)
    if sinks is not None:
        is_float(op, sinks=sinks)
        same_device(op, query, sinks=sinks)
        if sinks.shape != query.shape[1:2]:
            raise ValueError(
                f"{op}: sinks has shape {tuple(sinks.shape)}; it must be (heads,) = "
                f"({query.shape[1]},)"
            )


def option_names(**used: Any) -> frozenset[str]:
    """The names of the options in use: those that are neither None nor False."""
    return frozenset(
        name for name, value in used.items() if value is not None and value is not False
    )
