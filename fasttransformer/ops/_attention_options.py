"""Attention's options, for attention and the operations that take them beside it: checks, and how
they are handed to the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import Kernel
from ._attention_checks import (
    check_alignment,
    check_bias,
    check_mask,
    check_sinks,
    check_slopes,
    check_softcap,
    check_window,
)
from ._front import needs_grad


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


# ---- for the kernels ----------------------------------------------------------------------------


def kernel_bias(bias: Tensor, query: Tensor, grad: int) -> Tensor:
    """A bias in a dtype that kernels read; without stride-0 dimensions if it wants a gradient, of
    which those would have one number each."""
    if bias.dtype != torch.float32 and bias.dtype != query.dtype:
        bias = bias.float()
    if grad and needs_grad(bias) and 0 in bias.stride():
        bias = bias.contiguous()
    return bias


def needs_wide_inputs(
    kernel: Kernel, query: Tensor, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    """Whether a gradient in float32 would have 16-bit errors: the backward reads ``out``, which has
    the inputs' dtype. The CPU kernel computes in float32 anyway, so this costs memory only."""
    if kernel.backend != "cpu" or query.dtype == torch.float32:
        return False
    wide = bias if bias is not None and bias.dtype == torch.float32 else None
    return bool(needs_grad(wide, sinks))


def kernel_slopes(alibi_slopes: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """(batch, heads) float32."""
    if alibi_slopes is None:
        return None
    return alibi_slopes.detach().float().expand(batch, heads).contiguous()


def kernel_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(max(head_dim, 1)) if scale is None else float(scale)


def kernel_softcap(softcap: float | None) -> float:
    """0 = off."""
    return 0.0 if softcap is None else float(softcap)


def kernel_sinks(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.float().contiguous()


def expanded(scores_view: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask or bias as a view of the scores' shape."""
    return None if scores_view is None else scores_view.expand(shape)


def own_bias_gradient(d_bias: Tensor, bias: Tensor) -> Tensor:
    """A kernel's d_bias, which has size 1 where the bias broadcasts, in the bias's own shape."""
    own = bias.shape
    if bias.numel() == 0:  # whatever its strides, which tell the kernel what broadcasts
        return bias.new_zeros(own)
    return d_bias.sum_to_size((1,) * (4 - len(own)) + own).reshape(own).to(bias.dtype)


def d_bias_shape(expanded_bias: Tensor) -> list[int]:
    return [1 if step == 0 and size > 1 else size
            for size, step in zip(expanded_bias.shape, expanded_bias.stride())]  # fmt: skip
