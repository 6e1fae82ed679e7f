"""attention and scaled_dot_product_attention: checks, choice of a backend, autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ._attention_vmap import register_vmap
from ._front import (
    FLOATS,
    autocast_dtype,
    fake,
    is_float,
    needs_grad,
    new_seed,
    probability,
    same_device,
    same_dtype,
)

_ALIGNMENTS = ("top_left", "bottom_right")
_OPTION_NAMES = ("grad", "mask", "bias", "is_causal", "bottom_right", "window", "softcap",
                 "alibi_slopes", "sinks", "key_lengths", "dropout")  # fmt: skip
#: flags in the order of _OPTION_NAMES → the names that are in use; calls repeat, so sets are kept.
_options: dict[tuple[bool, ...], frozenset[str]] = {}


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

    A key takes part where every rule lets it: ``mask`` is True, ``bias`` is not −inf, and the causal
    rule, the window and ``key_lengths`` allow it. A query without any key gives output 0, lse −inf
    and gradient 0.  NaN in a query, or in a key or value that a query sees, makes that query's
    output NaN and no other's. A masked key is not felt, whatever it holds; a masked *value* that is
    NaN or inf may give NaN (0·NaN) unless no query of its tile sees it, and values behind
    ``key_lengths`` are never read.

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
        key_lengths: (batch,) int: keys at or behind the length are never read.
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
    is_float(op, query=query, key=key, value=value)
    same_device(op, query, key=key, value=value)
    _check_shapes(op, query, key, value)
    if mask is not None:
        mask = _check_mask(op, "mask", mask, query, key)
    if bias is not None:
        _check_bias(op, "bias", bias, query, key)
    if causal_alignment not in _ALIGNMENTS:
        raise ValueError(f"{op}: causal_alignment is {causal_alignment!r}; it must be 'top_left' "
                         "or 'bottom_right'")  # fmt: skip
    left, right = _check_window(op, window)
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"{op}: softcap is {softcap}; it must be a positive finite number, or None")
    if alibi_slopes is not None:
        alibi_slopes = _check_slopes(op, alibi_slopes, query)
    if sinks is not None:
        is_float(op, sinks=sinks)
        same_device(op, query, sinks=sinks)
        if sinks.shape != query.shape[1:2]:
            raise ValueError(f"{op}: sinks has shape {tuple(sinks.shape)}; it must be (heads,) = "
                             f"({query.shape[1]},)")  # fmt: skip
    if key_lengths is not None:
        key_lengths = _check_lengths(op, key_lengths, query)
    probability(op, dropout_p)
    bottom_right = causal_alignment == "bottom_right"
    out, lse = _attend(
        op, query, key, value, mask, bias, is_causal, bottom_right, left, right,
        0.0 if softcap is None else float(softcap), alibi_slopes, sinks, key_lengths, scale,
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
    """:func:`torch.nn.functional.scaled_dot_product_attention`, signature and rules.

    Args:
        query: (..., heads, q_len, head_dim); with three dimensions or two, heads are left out.
            Leading dimensions of the three inputs broadcast.
        key: (..., kv_heads, kv_len, head_dim); kv_heads differs from heads with ``enable_gqa`` only.
        value: (..., kv_heads, kv_len, value_dim).
        attn_mask: bool (True takes part) or float (added; may require a gradient); broadcasts to
            (..., heads, q_len, kv_len). Excludes ``is_causal``.
        dropout_p: always applied (there is no training flag), as in torch.
        is_causal: query i sees keys ``j <= i``, also where q_len differs from kv_len.
        scale: default ``1/sqrt(head_dim)``.
        enable_gqa: kv_heads may divide heads.
        backend: forces one backend for this call.

    Returns:
        (..., heads, q_len, value_dim). A query without any key gives 0.

    Raises:
        TypeError, ValueError: as :func:`attention`.

    >>> import torch, fasttransformer as ft
    >>> query = key = value = torch.randn(2, 3, 4, 8)
    >>> torchs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> ours = ft.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> torch.allclose(ours, torchs, atol=1e-6)
    True
    """
    op = "scaled_dot_product_attention"
    is_float(op, query=query, key=key, value=value)
    same_device(op, query, key=key, value=value)
    if attn_mask is not None and is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal exclude each other")
    probability(op, dropout_p)
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0]:
        leading = None
        if not enable_gqa and query.shape[1] != key.shape[1]:
            _check_heads(op, query, key, value)
            if query.shape[1] == 1:
                query = query.expand(-1, key.shape[1], -1, -1)
    else:
        query, key, value, leading = _flatten(op, query, key, value, enable_gqa)
    _check_shapes(op, query, key, value)
    mask = bias = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"{op}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
        if leading is not None:
            attn_mask = _flatten_mask(op, attn_mask, leading, query, key)
        if attn_mask.dtype == torch.bool:
            mask = _check_mask(op, "attn_mask", attn_mask, query, key)
        else:
            bias = attn_mask
            _check_bias(op, "attn_mask", bias, query, key)
    out, _ = _attend(
        op, query, key, value, mask, bias, is_causal, False, -1, -1, 0.0, None, None, None, scale,
        dropout_p, False, backend,
    )  # fmt: skip
    return out if leading is None else out.reshape(*leading, *out.shape[-2:])


# ---- checks ---------------------------------------------------------------------------------------


def _check_shapes(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        for name, shape in (("query", q), ("key", k), ("value", v)):
            if len(shape) != 4:
                raise ValueError(f"{op}: {name} has shape {tuple(shape)}; it must have 4 dimensions, "
                                 "(batch, heads, sequence, head_dim)")  # fmt: skip
    if k[0] != q[0] or v[0] != q[0]:
        raise ValueError(f"{op}: query has batch {q[0]}, key {k[0]} and value {v[0]} (shapes "
                         f"{tuple(q)}, {tuple(k)}, {tuple(v)}); they must be equal")  # fmt: skip
    if k[1] != v[1]:
        raise ValueError(f"{op}: key has {k[1]} heads, but value has {v[1]}")
    if k[1] != q[1] and (k[1] == 0 or q[1] % k[1] != 0):
        raise ValueError(
            f"{op}: key has {k[1]} heads, which does not divide query's {q[1]} heads"
        )
    if k[2] != v[2]:
        raise ValueError(f"{op}: key has length {k[2]}, but value has {v[2]}")
    if k[3] != q[3]:
        raise ValueError(f"{op}: key has head_dim {k[3]}, but query has {q[3]}")


def _scores_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    return (*query.shape[:3], key.shape[2])


def _does_not_broadcast(op: str, name: str, shape: tuple[int, ...], to: tuple[int, ...]) -> str:
    return (f"{op}: {name} of shape {tuple(shape)} does not broadcast to (batch, heads, q_len, "
            f"kv_len) = {tuple(to)}")  # fmt: skip


def _check_mask(op: str, name: str, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        hint = "give numbers that are added to the scores as bias" if op == "attention" else ""
        raise TypeError(f"{op}: {name} has dtype {mask.dtype}; it must be bool, True = takes part "
                        f"({hint})")  # fmt: skip
    same_device(op, query, **{name: mask})
    shape = _scores_shape(query, key)
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(_does_not_broadcast(op, name, mask.shape, shape)) from None


def _check_bias(op: str, name: str, bias: Tensor, query: Tensor, key: Tensor) -> None:
    if isinstance(bias, Tensor) and bias.dtype not in FLOATS:
        hint = "; a bool tensor is given as mask" if bias.dtype == torch.bool else ""
        raise TypeError(f"{op}: {name} has dtype {bias.dtype}; it must be a floating-point dtype"
                        f"{hint if op == 'attention' else ' or bool'}")  # fmt: skip
    is_float(op, **{name: bias})
    same_device(op, query, **{name: bias})
    shape = _scores_shape(query, key)
    own = bias.shape
    if len(own) > 4 or any(n != 1 and n != m for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(_does_not_broadcast(op, name, own, shape))


def _check_window(op: str, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    try:
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(f"{op}: window is {window!r}; it must be (left, right)") from None
    for size in (left, right):
        if size is not None and (not isinstance(size, int) or size < 0):
            raise ValueError(f"{op}: window is {window!r}; left and right must be integers, 0 or "
                             "more, or None = unbounded")  # fmt: skip
    return -1 if left is None else left, -1 if right is None else right


def _check_slopes(op: str, slopes: Tensor, query: Tensor) -> Tensor:
    is_float(op, alibi_slopes=slopes)
    same_device(op, query, alibi_slopes=slopes)
    if slopes.shape != query.shape[:2] and slopes.shape != query.shape[1:2]:
        raise ValueError(f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; it must be (heads,) "
                         f"= ({query.shape[1]},) or (batch, heads) = {tuple(query.shape[:2])}")  # fmt: skip
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes requires a gradient, which this operation does not "
                         "compute; pass alibi_slopes.detach(), or learn the slopes through bias")  # fmt: skip
    return slopes


def _check_lengths(op: str, lengths: Tensor, query: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{op}: key_lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: key_lengths has dtype {lengths.dtype}; it must be int32 or int64")
    same_device(op, query, key_lengths=lengths)
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"{op}: key_lengths has shape {tuple(lengths.shape)}; it must be (batch,) "
                         f"= ({query.shape[0]},)")  # fmt: skip
    return lengths


def _check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Without grouped queries, heads must be equal or broadcast."""
    q, k = query.shape[-3], key.shape[-3]
    if q != k and q != 1 and k != 1:
        raise ValueError(f"{op}: query has {q} heads, but key has {k}; pass enable_gqa=True if "
                         "groups of query heads share one key head")  # fmt: skip


def _flatten(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(batch, heads, sequence, head_dim) views or copies, and the output's leading dimensions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must have two "
                             "dimensions or more, (..., sequence, head_dim)")  # fmt: skip
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (x[(None,) * (rank - x.dim())] for x in (query, key, value))
    if rank < 4:  # no heads: every sequence is a batch entry of its own
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
    elif not enable_gqa:
        _check_heads(op, query, key, value)
        if query.shape[-3] == 1 and key.shape[-3] != 1:
            query = query.expand(*query.shape[:-3], *key.shape[-3:-2], *query.shape[-2:])
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        raise ValueError(f"{op}: the leading dimensions of query {tuple(query.shape)}, key "
                         f"{tuple(key.shape)} and value {tuple(value.shape)} do not broadcast") from None  # fmt: skip
    leading = tuple(batch) if rank < 4 else (*batch, query.shape[-3])
    count = math.prod(batch)
    query, key, value = (
        x.expand(*batch, *x.shape[-3:]).reshape(count, *x.shape[-3:]) for x in (query, key, value)
    )
    return query, key, value, leading


def _flatten_mask(op: str, mask: Tensor, leading: tuple[int, ...], query: Tensor, key: Tensor) -> Tensor:  # fmt: skip
    """A mask that broadcasts to (*leading, q_len, kv_len) as one of (batch, heads, q_len, kv_len).

    Its own size-1 dimensions behind the batch stay 1, so a copy, where one is needed, is small.
    """
    shape = (*leading, query.shape[2], key.shape[2])
    own = mask.shape
    if len(own) > len(shape) or any(n != 1 and n != m for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(_does_not_broadcast(op, "attn_mask", own, shape))
    mask = mask[(None,) * (len(shape) - len(own))]
    if len(shape) < 4:
        mask = mask.unsqueeze(-3)
    batch = leading if len(shape) < 4 else leading[:-1]
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])


# ---- running --------------------------------------------------------------------------------------


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
    device = query.device
    autocast = autocast_dtype(device.type)
    if autocast is not None:
        query, key, value = (x if x.dtype == torch.float64 else x.to(autocast)
                             for x in (query, key, value))  # fmt: skip
    same_dtype(op, query, key=key, value=value)
    head_dim = query.shape[3]
    scale = 1.0 / math.sqrt(max(head_dim, 1)) if scale is None else float(scale)
    flags = (
        needs_grad(query, key, value, bias, sinks), mask is not None, bias is not None, is_causal,
        bottom_right, window_left >= 0 or window_right >= 0, softcap != 0.0,
        alibi_slopes is not None, sinks is not None, key_lengths is not None, dropout_p > 0.0,
    )  # fmt: skip
    options = _options.get(flags)
    if options is None:
        options = frozenset(name for name, used in zip(_OPTION_NAMES, flags) if used)
        _options[flags] = options
    sizes = (("head_dim", max(head_dim, value.shape[3])),)
    kernel = choose(op, device.type, query.dtype, options, sizes, backend)
    seed = new_seed(device) if dropout_p > 0.0 else None
    if kernel.forward is None:
        with torch.autocast(device.type, enabled=False):
            result = reference.attention(
                query, key, value, mask=mask, bias=bias, is_causal=is_causal,
                causal_alignment=_ALIGNMENTS[bottom_right],
                window=(None if window_left < 0 else window_left,
                        None if window_right < 0 else window_right),
                softcap=softcap or None, alibi_slopes=alibi_slopes, sinks=sinks,
                key_lengths=key_lengths, scale=scale, dropout_p=dropout_p, return_lse=return_lse,
                seed=seed,
            )  # fmt: skip
        return result if return_lse else (result, None)
    if bias is not None:
        if bias.dtype != torch.float32 and bias.dtype != query.dtype:
            bias = bias.float()
        if flags[0] and bias.requires_grad and 0 in bias.stride():
            # d_bias has one number per stride-0 dimension; an expanded bias wants one per element.
            bias = bias.contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().float().expand(query.shape[:2]).contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if key_lengths is not None:
        key_lengths = key_lengths.clamp(0, key.shape[2]).to(torch.int32).contiguous()
    arguments = (
        _last_stride_one(query), _last_stride_one(key), _last_stride_one(value), mask, bias,
        is_causal, bottom_right, window_left, window_right, softcap, alibi_slopes, sinks,
        key_lengths, scale, dropout_p, seed,
    )  # fmt: skip
    return run(kernel, arguments)


def run(kernel: Kernel, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The kernel's operator, through autograd where a gradient is needed; ``bias`` unexpanded."""
    query, key, value, _, bias, *_, sinks, _, _, _, _ = arguments
    if needs_grad(query, key, value, bias, sinks):
        return _Attention.apply(*arguments, kernel)
    return _Attention.forward(*arguments, kernel)


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(_scores_shape(query, key))


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right,
                softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p, seed, kernel):  # fmt: skip
        return kernel.forward(query, key, value, mask, _expanded(bias, query, key), is_causal,
                              bottom_right, window_left, window_right, softcap, alibi_slopes, sinks,
                              key_lengths, scale, dropout_p, seed)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        (query, key, value, mask, bias, is_causal, bottom_right, window_left, window_right, softcap,
         alibi_slopes, sinks, key_lengths, scale, dropout_p, seed, kernel) = inputs  # fmt: skip
        out, lse = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, mask, bias, alibi_slopes, sinks,
                              key_lengths, seed)  # fmt: skip
        ctx.numbers = (is_causal, bottom_right, window_left, window_right, softcap, scale, dropout_p)
        ctx.kernel = kernel

    @staticmethod
    @torch.autograd.function.once_differentiable
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
            _last_stride_one(grad_out), None if grad_lse is None else grad_lse.contiguous(),
            query, key, value, out, lse, mask, _expanded(bias, query, key), is_causal, bottom_right,
            window_left, window_right, softcap, alibi_slopes, sinks, key_lengths, scale, dropout_p,
            seed, bias_grad, sinks_grad,
        )  # fmt: skip
        if bias_grad:
            own = bias.shape
            # Dimensions over which the bias broadcasts come back with size 1.
            d_bias = d_bias.sum_to_size((1,) * (4 - len(own)) + own).reshape(own).to(bias.dtype)
        return (d_query, d_key, d_value, None, d_bias if bias_grad else None, None, None, None,
                None, None, None, d_sinks if sinks_grad else None, None, None, None, None,
                None)  # fmt: skip


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

    d_bias = [0]
    if bias_grad:
        d_bias = [1 if step == 0 and size > 1 else size
                  for size, step in zip(bias.shape, bias.stride())]  # fmt: skip
    return (empty(query), empty(key), empty(value), query.new_empty(d_bias, dtype=torch.float32),
            query.new_empty([query.shape[1] if sinks_grad else 0], dtype=torch.float32))  # fmt: skip


register_vmap(run)
