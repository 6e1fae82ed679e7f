"""Attention of newly decoded tokens over a cache: checks, the append, choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ..reference.attention_decode import KVCache, check_apart, check_not_expanded, write_at
from ..reference.rotary_embedding import rotate
from ._attention_checks import check_flag, check_number, check_window, scores_shape, window_of
from ._attention_options import (
    check_options,
    expanded,
    kernel_bias,
    kernel_scale,
    kernel_sinks,
    kernel_slopes,
    kernel_softcap,
    option_names,
)
from ._front import (
    GRAD_OPTIONS,
    autocast_dtype,
    cast,
    fake,
    is_float,
    is_float_if_given,
    last_stride_one,
    needs_grad,
    recorded_as_graph,
    same_device,
    same_dtype,
)
from ._index import checked_index
from .rotary_embedding import check_tables


def attention_decode(
    query: Tensor,
    cache: KVCache,
    *,
    layer: int = 0,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""One decoding step: append the new tokens' keys and values to the cache, and attend over it.

    .. math:: \text{out}_b = \text{attention}(q_b, K_b[:L_b], V_b[:L_b]), \qquad
        L_b \leftarrow L_b + n \text{ first}

    where query i of S stands at position :math:`L_b - S + i`, and sees no later one with
    ``is_causal``. Samples may differ in length; what lies past a sample's length
    never affects the result.

    Args:
        query: (batch, heads, q_len, head_dim).
        cache: a :class:`~fasttransformer.KVCache`; the one argument that is written to.
        layer: which of the cache's layers.
        new_key: (batch, kv_heads, n, head_dim), of ``query``'s dtype; stored in the cache's.
            Without it, the query's tokens are the last ones in the cache.
        new_value: (batch, kv_heads, n, value_dim).
        rotary: (cos, sin), tables as of :func:`~fasttransformer.rotary_embedding`, (positions,
            head_dim or half of it); they turn the query and the new keys to their positions.
        rotary_interleaved: the tables turn features (2i, 2i + 1).
        mask, bias: broadcast to (batch, heads, q_len, capacity).
        window, softcap, alibi_slopes, sinks, scale: as of :func:`~fasttransformer.attention`.
        return_lse: also return lse, (batch, heads, q_len) float32.
        backend: forces one backend for this call.

    Returns:
        out (batch, heads, q_len, value_dim), or (out, lse). A gradient reaches the query, not what
        is in the cache.

    Raises:
        TypeError: not floating point, dtypes that differ, a cache of another kind.
        ValueError: shapes that don't fit, a full cache, a position outside the rotary tables, a
            value out of range. Nothing is written then. In graphs (torch.compile, export,
            torch.jit.trace), too, the lengths are looked at in each run, with an error of another
            wording; on a GPU a device-side assertion fails there instead, for no graph waits for
            the GPU.

    Source: Shazeer, Fast Transformer Decoding, 2019 (arXiv:1911.02150).

    >>> import torch, fasttransformer as ft
    >>> cache = ft.KVCache.allocate(layers=1, batch=1, heads=1, capacity=8, head_dim=2)
    >>> for step in range(3):
    ...     query, key = torch.zeros(2, 1, 1, 1, 2).unbind()
    ...     value = torch.full((1, 1, 1, 2), float(step))
    ...     out = ft.attention_decode(query, cache, new_key=key, new_value=value)
    >>> out.flatten(), cache.lengths  # the mean of 0, 1 and 2
    (tensor([1., 1.]), tensor([[3]], dtype=torch.int32))
    """
    op = "attention_decode"
    is_float(op, query=query)
    is_float_if_given(op, new_key=new_key, new_value=new_value)
    if not isinstance(cache, KVCache):
        raise TypeError(f"{op}: cache must be a KVCache, got {type(cache).__name__}")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"{op}: layer is {layer!r}; it must be an integer")
    layers = cache.lengths.shape[0]
    if not 0 <= layer < layers:
        raise ValueError(f"{op}: layer is {layer}; the cache has {layers} layers")
    keys, values, lengths = cache.checked_layer(layer)
    same_device(op, query, new_key=new_key, new_value=new_value, cache=keys)
    autocast = autocast_dtype(query.device.type)
    if autocast is not None:
        query, new_key = cast(query, autocast), cast(new_key, autocast)
        new_value = cast(new_value, autocast)
    same_dtype(op, query, new_key=new_key, new_value=new_value)
    _check_shapes(op, query, keys, values, new_key, new_value)
    check_options(op, query, keys, mask, bias, "top_left", window, softcap, alibi_slopes, sinks)
    # What is refused is refused before anything is written.
    left, right = check_window(op, window)
    check_flag(op, "is_causal", is_causal)
    check_number(op, "scale", scale)
    scale = kernel_scale(scale, query.shape[3])
    count = 0 if new_key is None else new_key.shape[2]
    tokens = query.shape[2]
    if rotary is not None:
        _check_rotary(op, query, rotary, rotary_interleaved)
    in_graph = recorded_as_graph()
    if in_graph:
        start = _start_in_graph(op, keys, values, lengths, count, tokens, rotary)
    else:
        _check_lengths(op, cache.extremes(layer), count, tokens, keys.shape[2], rotary)
    options = GRAD_OPTIONS[needs_grad(query, bias, sinks, alibi_slopes)] | option_names(
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mixed_dtypes=keys.dtype != query.dtype,
    )
    sizes = (("head_dim", max(query.shape[3], values.shape[3])),)
    kernel = choose(op, query.device.type, query.dtype, options, sizes, backend)
    if rotary is not None:
        first = (start if in_graph else lengths.long())[:, None]
        query = _turned(query, rotary, rotary_interleaved, first + (count - tokens))
        if new_key is not None:
            new_key = _turned(new_key, rotary, rotary_interleaved, first)
    if new_key is not None and new_value is not None:
        if in_graph:
            _append_in_graph(cache, layer, start, new_key, new_value)
        else:
            cache.append(layer, new_key, new_value)
    if in_graph:  # by the lengths that were checked, or no check would stay in the graph
        keys, values, _ = cache.layer(layer)
        cache, layer = KVCache(keys[None], values[None], (start + count).int()[None]), 0
    if kernel.forward is None:
        return reference.attention_decode(
            query,
            cache,
            layer=layer,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            window=window_of(left, right),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            return_lse=return_lse,
        )
    keys, values, lengths = cache.layer(layer)
    shape = scores_shape(query, keys)
    if bias is not None:
        bias = kernel_bias(bias, query, False)
    out, lse = kernel.forward(
        last_stride_one(query),
        keys,
        values,
        lengths,
        expanded(mask, shape),
        expanded(bias, shape),
        bool(is_causal),
        left,
        right,
        kernel_softcap(softcap),
        kernel_slopes(alibi_slopes, query.shape[0], query.shape[1]),
        kernel_sinks(sinks),
        scale,
    )
    return (out, lse) if return_lse else out


@fake("attention_decode")
def _(query, key, value, key_lengths, mask, bias, is_causal, window_left, window_right, softcap,
      alibi_slopes, sinks, scale):  # fmt: skip
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


def _turned(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool, start: Tensor) -> Tensor:
    position_ids = start + torch.arange(x.shape[2], device=x.device)
    return rotate(x, *tables, interleaved, position_ids)


def _check_shapes(
    op: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
) -> None:
    batch, kv_heads, _, head_dim = keys.shape
    if query.dim() != 4:
        raise ValueError(
            f"{op}: query has shape {tuple(query.shape)}; it must have 4 dimensions, "
            "(batch, heads, q_len, head_dim)"
        )
    if query.shape[0] != batch or query.shape[3] != head_dim:
        raise ValueError(
            f"{op}: query has shape {tuple(query.shape)}; the cache makes its batch "
            f"{batch} and its head_dim {head_dim}"
        )
    heads = query.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: the cache has {kv_heads} heads, which does not divide query's {heads} heads"
        )
    if (new_key is None) != (new_value is None):
        missing = "new_key" if new_key is None else "new_value"
        raise ValueError(f"{op}: {missing} is missing; new_key and new_value go together")
    if new_key is None or new_value is None:
        return
    for name, x, size in (
        ("new_key", new_key, head_dim),
        ("new_value", new_value, values.shape[3]),
    ):
        if x.dim() != 4 or (*x.shape[:2], x.shape[3]) != (batch, kv_heads, size):
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}; the cache makes it ({batch}, "
                f"{kv_heads}, n, {size})"
            )
    if new_key.shape[2] != new_value.shape[2]:
        raise ValueError(
            f"{op}: new_key has length {new_key.shape[2]}, but new_value has {new_value.shape[2]}"
        )


def _check_rotary(op: str, query: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> None:
    try:
        cos, sin = rotary
    except (TypeError, ValueError):
        raise ValueError(f"{op}: rotary must be a pair of tables, (cos, sin)") from None
    is_float(op, cos=cos, sin=sin)
    same_device(op, query, cos=cos, sin=sin)
    check_tables(op, cos, sin, query.shape[0], query.shape[3], interleaved)


def _check_lengths(
    op: str,
    extremes: tuple[int, int],
    count: int,
    tokens: int,
    capacity: int,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """Of a layer that holds from ``extremes[0]`` to ``extremes[1]`` tokens of its samples."""
    shortest, longest = extremes
    if longest + count > capacity:
        raise ValueError(
            f"{op}: the cache holds {longest} tokens of a sample; {count} new ones exceed "
            f"its capacity {capacity}"
        )
    if rotary is None:
        return
    first, end, positions = shortest + count - tokens, longest + count, rotary[0].shape[-2]
    if first < 0 or end > positions:
        raise ValueError(
            f"{op}: the tokens stand at positions {first} to {end - 1}; rotary's tables "
            f"have 0 to {positions - 1}"
        )


# ---- in graphs ----------------------------------------------------------------------------------

# A graph that is run again with other numbers can't take its way by them, nor remember them as a
# cache's ``extremes`` do. There, an operator looks at the lengths each time the graph is run, and
# all that is written or read stands at the positions that it returns, so that no optimization can
# drop it or put it behind what it protects. The append is an operator, too: of torch's own
# indexing, compilers make copies of a whole cache.

_LIBRARY = torch.library.Library("fasttransformer", "FRAGMENT")
_LIBRARY.define(
    "append_to_cache(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, SymInt layer, "
    "Tensor start, Tensor new_key, Tensor new_value) -> ()"
)


def _append_to_cache(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    layer: int,
    start: Tensor,
    new_key: Tensor,
    new_value: Tensor,
) -> None:
    keys, values = keys[layer], values[layer]
    check_apart(keys, values)
    write_at(start, keys, values, new_key, new_value)
    lengths[layer] = start + new_key.shape[2]


_LIBRARY.impl("append_to_cache", _append_to_cache, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttransformer::append_to_cache")
def _(keys, values, lengths, layer, start, new_key, new_value):
    pass


def _start_in_graph(
    op: str,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    count: int,
    tokens: int,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Each sample's length, (batch,) int64, known to be what :func:`_check_lengths` asks for.

    Raises:
        ValueError: it is not, when the graph is run; on a GPU a device-side assertion fails.
    """
    if count:
        check_not_expanded(keys, values, lengths)
    what = "cache.lengths, before the new tokens,"
    start = checked_index(op, what, lengths, keys.shape[2] - count + 1)
    if rotary is not None:
        ahead, positions = count - tokens, rotary[0].shape[-2]
        what = "the tensor of the queries' first positions in rotary's tables"
        start = checked_index(op, what, start + ahead, positions - tokens + 1) - ahead
    return start


@torch.no_grad()
def _append_in_graph(
    cache: KVCache, layer: int, start: Tensor, new_key: Tensor, new_value: Tensor
) -> None:
    if type(cache).append is not KVCache.append:
        return cache.append(layer, new_key, new_value)
    fields = cache.keys, cache.values, cache.lengths
    torch.ops.fasttransformer.append_to_cache(*fields, layer, start, new_key, new_value)
    cache._read_from = None  # what it remembers of the lengths is out of date
