"""Attention of the last tokens over a cache: attention's forward kernel, with query i of S standing
at key_lengths − S + i of its sample (see _attention.py)."""

from torch import Tensor

from ._register import operator
from .attention import forward


@operator("out", "lse")
def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return forward(
        query, key, value, mask, bias, is_causal, False, window_left, window_right, softcap,
        alibi_slopes, sinks, key_lengths, scale, 0.0, None, at_end=True,
    )  # fmt: skip
