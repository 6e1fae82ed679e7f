"""torch.nn's two masks of attention, turned into ft.attention's ``mask`` and ``bias``.

torch.nn: bool True = *left out*, float = added to the scores; ``attn_mask`` is (L, S) or
(batch·heads, L, S) with index b·heads + h, ``key_padding_mask`` is (batch, S).
ft.attention: ``mask`` bool True = *takes part*, ``bias`` float, both broadcast to (B, H, L, S).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_mask(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"MultiheadAttention: {name} has dtype {mask.dtype}; it must be bool "
            "(True = left out) or floating point (added to the scores)"
        )


def attention_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    added_keys: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) for ft.attention; ``added_keys`` keys at the end are open to every query.

    Raises ValueError or TypeError for a mask of another shape or dtype.
    """
    mask = bias = None
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask)
        shape = attn_mask.shape
        if shape == (q_len, k_len):
            attn_mask = attn_mask[None, None]
        elif shape == (batch * heads, q_len, k_len):
            attn_mask = attn_mask.unflatten(0, (batch, heads)) if batch * heads else attn_mask.view(
                batch, heads, q_len, k_len
            )  # fmt: skip
        else:
            raise ValueError(
                f"MultiheadAttention: attn_mask has shape {tuple(shape)}; for query length {q_len}"
                f" and key length {k_len} it must be {(q_len, k_len)} or, with batch {batch} and "
                f"{heads} heads, {(batch * heads, q_len, k_len)}"
            )
        if added_keys:
            attn_mask = F.pad(attn_mask, (0, added_keys))
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = _in_bias_dtype(attn_mask, dtype)
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask)
        if key_padding_mask.shape != (batch, k_len):
            raise ValueError(
                f"MultiheadAttention: key_padding_mask has shape {tuple(key_padding_mask.shape)}; "
                f"it must be (batch, key length) = {(batch, k_len)}"
            )
        padding = key_padding_mask[:, None, None, :]
        if added_keys:
            padding = F.pad(padding, (0, added_keys))
        if padding.dtype == torch.bool:
            mask = padding if mask is None else mask | padding
        else:
            padding = _in_bias_dtype(padding, dtype)
            bias = padding if bias is None else bias + padding
    return None if mask is None else ~mask, bias


def _in_bias_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels take a bias in the query's dtype, or in float32 beside a 16-bit query."""
    if mask.dtype == dtype or (mask.dtype == torch.float32 and dtype != torch.float64):
        return mask
    return mask.to(dtype)
