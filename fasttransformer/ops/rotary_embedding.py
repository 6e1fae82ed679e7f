"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Kernel, choose
from ._front import (
    GRAD_OPTIONS,
    fake,
    float32_at_most,
    is_float,
    last_stride_one,
    needs_grad,
    same_device,
    same_dtype,
)
from ._function import differentiable, vmap_rule
from ._index import checked_first, checked_for, is_index_if_given, kernel_ids


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``query`` and ``key`` with each pair of features turned by its position's angle.

    .. math:: (a, b) \mapsto (a \cos\theta - b \sin\theta,\; b \cos\theta + a \sin\theta)

    The product of a query and a key then depends on their distance alone. The gradient is turned
    back by the same angle; nothing is modified in place.

    Args:
        query: (batch, heads, length, head_dim), head_dim even.
        key: (batch, kv_heads, length, head_dim).
        cos, sin: (positions, width) or (batch or 1, positions, width), of any float dtype. The
            width is head_dim / 2, an angle per pair, or, for half-split pairs, head_dim, the angles
            twice, as transformers makes them.
        interleaved: the pairs are features (2i, 2i + 1); else (i, i + head_dim / 2).
        position_ids: (length,) or (batch or 1, length): the row of the tables for each token; row i
            for token i unless given.
        backend: forces one backend for this call.

    Returns:
        (query, key), in their shapes and dtype; computed in float32 for 16-bit types.

    Raises:
        TypeError: not floating point, query and key of different dtypes, ids that are no integers.
        ValueError: shapes that don't fit; a position outside the tables, in compiled graphs too (a
            device-side assertion on a GPU).

    Source: Su et al., RoFormer, 2021 (arXiv:2104.09864).

    >>> import torch, fasttransformer as ft
    >>> query = key = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> angle = torch.tensor([[torch.pi / 2]])
    >>> ft.rotary_embedding(query, key, angle.cos(), angle.sin())[0].flatten().round().abs()
    tensor([0., 1.])
    """
    op = "rotary_embedding"
    is_float(op, query=query, key=key, cos=cos, sin=sin)
    is_index_if_given(op, position_ids=position_ids)
    same_device(op, query, key=key, cos=cos, sin=sin, position_ids=position_ids)
    same_dtype(op, query, key=key)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}; it must have 4 dimensions, "
                "(batch, heads, length, head_dim)"
            )
    batch, _, length, head_dim = query.shape
    if (key.shape[0], *key.shape[2:]) != (batch, length, head_dim):
        raise ValueError(
            f"{op}: key has shape {tuple(key.shape)}, but query has "
            f"{tuple(query.shape)}; only their numbers of heads may differ"
        )
    check_tables(op, cos, sin, batch, head_dim, interleaved)
    positions = cos.shape[-2]
    if position_ids is None:
        if positions < length:
            raise ValueError(
                f"{op}: cos and sin have {positions} positions, but query has length {length}"
            )
    elif position_ids.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"{op}: position_ids has shape {tuple(position_ids.shape)}; it must be "
            f"({length},), (1, {length}) or ({batch}, {length})"
        )
    else:
        position_ids = checked_first(op, "position_ids", position_ids, positions)
    options = _options(query, key, cos, sin)
    kernel = choose(op, query.device.type, query.dtype, options, (), backend)
    if position_ids is not None:
        position_ids = checked_for(kernel, op, "position_ids", position_ids, positions)
    if kernel.forward is not None:
        return _on_kernel(query, key, cos, sin, interleaved, position_ids, kernel)
    return reference.rotary_embedding(
        query, key, cos, sin, interleaved=interleaved, position_ids=position_ids
    )


def _options(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> frozenset[str]:
    options = GRAD_OPTIONS[needs_grad(query, key, cos, sin)]
    return options | {"table_grad"} if needs_grad(cos, sin) else options


def _on_kernel(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    position_ids: Tensor | None,
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    cos, sin = (last_stride_one(float32_at_most(table)) for table in (cos, sin))
    if position_ids is not None:
        position_ids = kernel_ids(position_ids)
    query, key = last_stride_one(query), last_stride_one(key)
    if needs_grad(query, key):
        return _rotary_with_grad(query, key, cos, sin, position_ids, interleaved, kernel)
    return kernel.forward(query, key, cos, sin, interleaved, position_ids)


class _Rotary:
    @staticmethod
    def forward(query, key, cos, sin, position_ids, interleaved, kernel):
        return kernel.forward(query, key, cos, sin, interleaved, position_ids)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, cos, sin, position_ids, ctx.interleaved, ctx.kernel = inputs
        ctx.save_for_backward(cos, sin, position_ids)

    @staticmethod
    def backward(ctx, grad_query, grad_key):
        cos, sin, position_ids = ctx.saved_tensors
        grads = last_stride_one(grad_query), last_stride_one(grad_key)
        d_query, d_key = ctx.kernel.backward(*grads, cos, sin, ctx.interleaved, position_ids)
        return d_query, d_key, None, None, None, None, None


_rotary_with_grad = differentiable(_Rotary, tensors=5)


@fake("rotary_embedding")
def _(query, key, cos, sin, interleaved, position_ids):
    return query.new_empty(query.shape), key.new_empty(key.shape)


@fake("rotary_embedding_backward")
def _(grad_query, grad_key, cos, sin, interleaved, position_ids):
    return grad_query.new_empty(grad_query.shape), grad_key.new_empty(grad_key.shape)


@vmap_rule("rotary_embedding")
def _(operator, batch_size, in_dims, *args):
    return None


@vmap_rule("rotary_embedding_backward")
def _(operator, batch_size, in_dims, *args):
    return None


def check_tables(
    op: str, cos: Tensor, sin: Tensor, batch: int | torch.SymInt, head_dim: int, interleaved: bool
) -> None:
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: cos has shape {tuple(cos.shape)}, but sin has {tuple(sin.shape)}")
    if cos.dim() not in (2, 3) or (cos.dim() == 3 and cos.shape[0] != 1 and cos.shape[0] != batch):
        raise ValueError(
            f"{op}: cos and sin have shape {tuple(cos.shape)}; it must be (positions, "
            f"width), or (batch, positions, width) with batch 1 or {batch}"
        )
    if head_dim % 2:
        raise ValueError(f"{op}: query has head_dim {head_dim}; it must be even, to make pairs")
    width = cos.shape[-1]
    if width != head_dim // 2 and (interleaved or width != head_dim):
        allowed = (
            f"{head_dim // 2}, interleaved" if interleaved else f"{head_dim // 2} or {head_dim}"
        )
        raise ValueError(
            f"{op}: cos and sin have width {width}; head_dim {head_dim} makes it {allowed}"
        )
