"""Checks of attention's options for the operations that take them beside attention itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._attention_checks import (
    check_alignment,
    check_bias,
    check_mask,
    check_sinks,
    check_slopes,
    check_softcap,
    check_window,
)


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
        check_mask(op, "mask", mask, query, key)
    if bias is not None:
        check_bias(op, "bias", bias, query, key)
    check_alignment(op, causal_alignment)
    check_window(op, window)
    check_softcap(op, softcap)
    if alibi_slopes is not None:
        check_slopes(op, alibi_slopes, query)
    if sinks is not None:
        check_sinks(op, sinks, query)


def option_names(**used: Any) -> frozenset[str]:
    """The names of the options in use: those that are neither None nor False."""
    return frozenset(
        name for name, value in used.items() if value is not None and value is not False
    )
