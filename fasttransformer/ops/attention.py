"""attention and scaled_dot_product_attention: checks, choice of a backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ..reference.precision import without_autocast
from . import _attention_vmap  # noqa: F401  (registers the vmap rules)
from ._attention_checks import (
    ALIGNMENTS,
    check_alignment,
    check_bias,
    check_heads,
    check_lengths,
    check_mask,
    check_number,
    check_shapes,
    check_sinks,
    check_slopes,
    check_softcap,
    check_window,
    flatten,
    flatten_mask,
    scores_shape,
    window_of,
)
from ._attention_options import (
    d_bias_shape,
    expanded,
    kernel_bias,
    kernel_scale,
    kernel_sinks,
    kernel_slopes,
    kernel_softcap,
    needs_wide_inputs,
    option_names,
    own_bias_gradient,
)
from ._front import (
    GRAD_OPTIONS,
    alike,
    autocast_dtype,
    autocast_enabled,
    device_type_of,
    fake,
    is_float,
    last_stride_one,
    needs_grad,
    new_seed,
    probability,
    same_device,
    same_dtype,
)
from ._function import differentiable

_OPTION_NAMES = ("mask", "bias", "is_causal", "bottom_right", "window", "softcap",
                 "alibi_slopes", "sinks", "key_lengths", "dropout",
                 "alibi_slopes_grad")  # fmt: skip
#: needs_grad's answer and flags in the order of _OPTION_NAMES → the names that are in use; calls
#: repeat, so sets are kept.
_options: dict[tuple[int, ...], frozenset[str]] = {}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Scaled dot-product attention with every option; memory grows linearly with the lengths.

    .. math::
        s_{ij} &= \text{softcap}(\text{scale} \cdot q_i k_j) - \text{slope}\,|j - i| + b_{ij},
            \quad -\infty \text{ where masked} \\
        \text{lse}_i &= \log \Big(\sum_j e^{s_{ij}} + e^{\text{sink}}\Big), \qquad
        \text{out}_i = \sum_j e^{s_{ij} - \text{lse}_i} v_j

    A key takes part where every rule lets it: ``mask`` is True, ``bias`` is not −inf, and the
    causal rule, the window and ``key_lengths`` allow it. A query without any key gives output 0
    and gradient 0; its lse is its sink, or −inf where it has none. NaN in a query, or in a key or
    value that a query sees, makes that query's output NaN and no other's. A masked key never
    affects the result, whatever it holds; a masked *value* that is NaN or inf may give NaN (0·NaN)
    to queries that are computed next to others that see it. Keys and values past ``key_lengths``
    are never read.

    Args:
        query: (batch, heads, q_len, head_dim); float32, float16, bfloat16 (or float64: reference).
            Any strides; a last stride other than 1 costs a copy.
        key: (batch, kv_heads, kv_len, head_dim); kv_heads divides heads (grouped-query attention).
        value: (batch, kv_heads, kv_len, value_dim).
        mask: bool, broadcasts to (batch, heads, q_len, kv_len); True takes part.
        bias: float, broadcasts likewise; added to the scores. It may require a gradient, which has
            the bias's own shape. Its −inf masks; any other number, finfo.min too, is a number.
        is_causal: query i sees keys ``j <= i`` (``causal_alignment="top_left"``, torch's rule) or
            ``j <= i + kv_len - q_len`` (``"bottom_right"``).
        window: (left, right): keys from i − left to i + right, either None = unbounded; i is
            shifted by kv_len − q_len when the alignment is ``"bottom_right"``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        alibi_slopes: (heads,) or (batch, heads).
        sinks: (heads,); one extra logit per head that takes weight and gives no value.
        key_lengths: (batch,) int: keys from the length on are never read.
        scale: default ``1/sqrt(head_dim)``; may be zero or negative.
        dropout_p: each weight is dropped with this probability (there is no training flag); the
            mask is a function of a seed drawn from torch's generator and the weight's position.
        return_lse: also return lse, (batch, heads, q_len) float32; it can be differentiated.
        backend: forces one backend for this call.

    Returns:
        out (batch, heads, q_len, value_dim), laid out in memory as (batch, q_len, heads, value_dim)
        so that ``out.transpose(1, 2).flatten(2)`` is a view; or (out, lse).

    Raises:
        TypeError: an input that is not floating point, dtypes that differ, a mask that is not bool.
        ValueError: shapes that do not fit, a value out of range. Both before anything is computed.

    Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).

    >>> import torch, fasttransformer as ft
    >>> query = torch.randn(2, 8, 5, 16)
    >>> key, value = torch.randn(2, 2, 2, 7, 16).unbind()
    >>> ft.attention(query, key, value, is_causal=True, causal_alignment="bottom_right").shape
    torch.Size([2, 8, 5, 16])
    """
    op = "attention"
    check_tensors(op, query, key, value)
    check_shapes(op, query, key, value)
    if mask is not None:
        mask = check_mask(op, "mask", mask, query, key)
    if bias is not None:
        check_bias(op, "bias", bias, query, key)
    check_alignment(op, causal_alignment)
    left, right = check_window(op, window)
    check_softcap(op, softcap)
    if alibi_slopes is not None:
        alibi_slopes = check_slopes(op, alibi_slopes, query)
    if sinks is not None:
        check_sinks(op, sinks, query)
    if key_lengths is not None:
        key_lengths = check_lengths(op, key_lengths, query)
    probability(op, dropout_p)
    bottom_right = causal_alignment == "bottom_right"
    out, lse = _attend(
        op, query, key, value, mask, bias, is_causal, bottom_right, left, right,
        kernel_softcap(softcap), alibi_slopes, sinks, key_lengths, scale,
        dropout_p, return_lse, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    r""":func:`torch.nn.functional.scaled_dot_product_attention`, signature and rules.

    .. math:: O = \text{softmax}(\text{scale} \cdot Q K^\top + \text{mask})\, V

    Args:
        query: (..., heads, q_len, head_dim); with three dimensions or two, heads are left out.
            Leading dimensions of the three inputs broadcast.
        key: (..., kv_heads, kv_len, head_dim); kv_heads may differ with ``enable_gqa`` only.
        value: (..., kv_heads, kv_len, value_dim).
        attn_mask: bool (True takes part) or float (added; may require a gradient); broadcasts to
            (..., heads, q_len, kv_len). With ``is_causal`` of four dimensions both apply, as on
            torch's CPU; of others they exclude each other.
        dropout_p: in [0, 1]; always applied (there is no training flag), as in torch.
        is_causal: query i sees keys ``j <= i``, also where q_len differs from kv_len.
        scale: default ``1/sqrt(head_dim)``.
        enable_gqa: kv_heads may divide heads.
        backend: forces one backend for this call.

    Returns:
        (..., heads, q_len, value_dim) in ``query``'s dtype. A query without any key gives 0.

    Raises:
        TypeError, ValueError: as :func:`attention`.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.2.1.

    >>> import torch, fasttransformer as ft
    >>> query = key = value = torch.randn(2, 3, 4, 8)
    >>> torchs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> ours = ft.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> torch.allclose(ours, torchs, atol=1e-6)
    True
    """
    op = "scaled_dot_product_attention"
    check_tensors(op, query, key, value)
    four = query.dim() == key.dim() == value.dim() == 4
    if attn_mask is not None and is_causal and not four:
        raise ValueError(
            f"{op}: attn_mask and is_causal exclude each other, but for inputs of 4 dimensions"
        )
    if enable_gqa and query.dim() == key.dim() == value.dim() == 3:  # (heads, sequence, head_dim)
        return scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask, dropout_p, is_causal, scale, True,
            backend=backend,
        )[0]  # fmt: skip
    if not isinstance(dropout_p, Tensor) and dropout_p == 1.0:
        # Everything is dropped; NaN stays, as in torch.
        return 0.0 * scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, backend=backend
        )
    probability(op, dropout_p)
    if four and query.shape[0] == key.shape[0]:
        leading = None
        if not enable_gqa and query.shape[1] != key.shape[1]:
            check_heads(op, query, key, value)
            if query.shape[1] == 1:
                query = query.expand(-1, key.shape[1], -1, -1)
    else:
        query, key, value, leading = flatten(op, query, key, value, enable_gqa)
    check_shapes(op, query, key, value)
    mask = bias = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"{op}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
        if leading is not None:
            attn_mask = flatten_mask(op, attn_mask, leading, query, key)
        if attn_mask.dtype == torch.bool:
            mask = check_mask(op, "attn_mask", attn_mask, query, key)
        else:
            bias = attn_mask
            check_bias(op, "attn_mask", bias, query, key)
    out, _ = _attend(
        op, query, key, value, mask, bias, is_causal, False, -1, -1, 0.0, None, None, None, scale,
        dropout_p, False, backend,
    )  # fmt: skip
    return out if leading is None else out.reshape(*leading, *out.shape[-2:])


# ---- running ----------------------------------------------------------------------------------


def check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Floating point, one device and, but for autocast, one dtype."""
    if isinstance(query, Tensor) and autocast_enabled(device_type_of(query)):
        is_float(op, query=query, key=key, value=value)
        same_device(op, query, key=key, value=value)
    else:
        alike(op, ("query", "key", "value"), (query, key, value), 3)


def _attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Checked arguments in; picks the backend and runs it. lse is None where nobody asked."""
    device_type = device_type_of(query)
    autocast = autocast_dtype(device_type)
    if autocast is not None:
        query, key, value = (x if x.dtype == torch.float64 else x.to(autocast)
                             for x in (query, key, value))  # fmt: skip
        same_dtype(op, query, key=key, value=value)
    head_dim = query.shape[3]
    check_number(op, "scale", scale)
    scale = kernel_scale(scale, head_dim)
    flags = (
        needs_grad(query, key, value, bias, sinks, alibi_slopes), mask is not None,
        bias is not None, is_causal,
        bottom_right, window_left >= 0 or window_right >= 0, softcap != 0.0,
        alibi_slopes is not None, sinks is not None, key_lengths is not None, dropout_p > 0.0,
        alibi_slopes is not None and needs_grad(alibi_slopes),
    )  # fmt: skip
    options = _options.get(flags)
    if options is None:
        options = GRAD_OPTIONS[flags[0]] | option_names(**dict(zip(_OPTION_NAMES, flags[1:])))
        _options[flags] = options
    sizes = (("head_dim", max(head_dim, value.shape[3])),)
    kernel = choose(op, device_type, query.dtype, options, sizes, backend)
    seed = new_seed(query.device) if dropout_p > 0.0 else None
    dtype = query.dtype
    if kernel.forward is None:
        with without_autocast(query):
            result = reference.attention(
                query, key, value, mask=mask, bias=bias, is_causal=is_causal,
                causal_alignment=ALIGNMENTS[bottom_right],
                window=window_of(window_left, window_right),
                softcap=softcap or None, alibi_slopes=alibi_slopes, sinks=sinks,
                key_lengths=key_lengths, scale=scale, dropout_p=dropout_p, return_lse=return_lse,
                seed=seed,
            )  # fmt: skip
        return result if return_lse else (result, None)
    if bias is not None:
        bias = kernel_bias(bias, query, flags[0])
    if flags[0] and needs_wide_inputs(kernel, query, bias, sinks):
        query, key, value = query.float(), key.float(), value.float()
        bias = None if bias is None else bias.float()  # the kernels know no other beside these
    if alibi_slopes is not None:
        alibi_slopes = kernel_slopes(alibi_slopes, query.shape[0], query.shape[1])
    if sinks is not None:
        sinks = kernel_sinks(sinks)
    if key_lengths is not None:
        key_lengths = key_lengths.clamp(0, key.shape[2]).to(torch.int32).contiguous()
    arguments = (
        last_stride_one(query), last_stride_one(key), last_stride_one(value), mask, bias,
        is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes, sinks,
        key_lengths, scale, dropout_p, seed,
    )  # fmt: skip
    if flags[0]:
        out, lse = _differentiable(*arguments, kernel)
        return out.to(dtype), lse
    return _Attention.forward(*arguments, kernel)


class _Attention:
    @staticmethod
    def forward(query, key, value, mask, bias, is_causal, bottom_right, window_left,
                window_right, softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p, seed,
                kernel):  # fmt: skip
        bias = expanded(bias, scores_shape(query, key))
        return kernel.forward(query, key, value, mask, bias, is_causal, bottom_right, window_left,
                              window_right, softcap, alibi_slopes, sinks, key_lengths, scale,
                              dropout_p, seed)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        (query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
         alibi_slopes, sinks, key_lengths, scale, dropout_p, seed, kernel) = inputs  # fmt: skip
        out, lse = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, mask, bias, alibi_slopes, sinks,
                              key_lengths, seed)  # fmt: skip
        ctx.numbers = (is_causal, bottom_right, window_left, window_right, softcap, scale,
                       dropout_p)  # fmt: skip
        ctx.kernel = kernel

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        (query, key, value, out, lse, mask, bias, alibi_slopes, sinks, key_lengths,
         seed) = ctx.saved_tensors  # fmt: skip
        is_causal, bottom_right, window_left, window_right, softcap, scale, dropout_p = ctx.numbers
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 17
            grad_out = torch.zeros_like(out)
        bias_grad, sinks_grad = ctx.needs_input_grad[4], ctx.needs_input_grad[11]
        d_query, d_key, d_value, d_bias, d_sinks = ctx.kernel.backward(
            last_stride_one(grad_out), None if grad_lse is None else grad_lse.contiguous(),
            query, key, value, out, lse, mask, expanded(bias, scores_shape(query, key)), is_causal,
            bottom_right, window_left, window_right, softcap, alibi_slopes, sinks, key_lengths,
            scale, dropout_p, seed, bias_grad, sinks_grad,
        )  # fmt: skip
        if bias_grad:
            d_bias = own_bias_gradient(d_bias, bias)
        return (d_query, d_key, d_value, None, d_bias if bias_grad else None, None, None, None,
                None, None, None, d_sinks if sinks_grad else None, None, None, None, None,
                None)  # fmt: skip


_differentiable = differentiable(_Attention, tensors=5)


def _heads_last(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


@fake("attention")
def _(query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
      alibi_slopes, sinks, key_lengths, scale, dropout_p, seed):  # fmt: skip
    batch, heads, length, _ = query.shape
    out = _heads_last(query, batch, heads, length, value.shape[3])
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


@fake("attention_backward")
def _(grad_out, grad_lse, query, key, value, out, lse, mask, bias, is_causal, bottom_right,
      window_left, window_right, softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p, seed,
      bias_grad, sinks_grad):  # fmt: skip
    def empty(x):
        batch, heads, length, dim = x.shape
        return _heads_last(query, batch, heads, length, dim)

    d_bias = d_bias_shape(bias) if bias_grad else [0]
    d_sinks = [query.shape[1] if sinks_grad else 0]
    return (empty(query), empty(key), empty(value), query.new_empty(d_bias, dtype=torch.float32),
            query.new_empty(d_sinks, dtype=torch.float32))  # fmt: skip
