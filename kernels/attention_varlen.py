"""Attention over packed sequences: attention's kernels, whose programs find their rows by the
sequences' boundaries (see _attention.py)."""

from torch import Tensor

from ._register import operator
from .attention import Packing, backward, forward


@operator("out", "lse")
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return forward(
        query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
        alibi_slopes, sinks, None, scale, dropout_p, seed,
        packing=Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
    )  # fmt: skip


@operator("d_query", "d_key", "d_value", "d_bias", "d_sinks")
def attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(
        grad_out, grad_lse, query, key, value, out, lse, mask, bias, is_causal, bottom_right,
        window_left, window_right, softcap, alibi_slopes, sinks, None, scale, dropout_p, seed,
        bias_grad, sinks_grad, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
    )  # fmt: skip
