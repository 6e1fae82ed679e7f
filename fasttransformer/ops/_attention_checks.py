"""The checks of attention's arguments, and the shapes of torch's signature brought to four
dimensions. Messages name the argument, what was given and the rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._front import FLOATS, is_float, same_device

ALIGNMENTS = ("top_left", "bottom_right")


def check_alignment(op: str, causal_alignment: str) -> None:
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(
            f"{op}: causal_alignment is {causal_alignment!r}; it must be 'top_left' or "
            "'bottom_right'"
        )


def check_shapes(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        for name, shape in (("query", q), ("key", k), ("value", v)):
            if len(shape) != 4:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(shape)}; it must have 4 dimensions, "
                    "(batch, heads, sequence, head_dim)"
                )
    if k[0] != q[0] or v[0] != q[0]:
        raise ValueError(
            f"{op}: query has batch {q[0]}, key {k[0]} and value {v[0]} (shapes "
            f"{tuple(q)}, {tuple(k)}, {tuple(v)}); they must be equal"
        )
    if k[1] != v[1]:
        raise ValueError(f"{op}: key has {k[1]} heads, but value has {v[1]}")
    if k[1] != q[1] and (k[1] == 0 or q[1] % k[1] != 0):
        raise ValueError(f"{op}: key has {k[1]} heads, which does not divide query's {q[1]} heads")
    if k[2] != v[2]:
        raise ValueError(f"{op}: key has length {k[2]}, but value has {v[2]}")
    if k[3] != q[3]:
        raise ValueError(f"{op}: key has head_dim {k[3]}, but query has {q[3]}")


def scores_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    return (*query.shape[:3], key.shape[2])


def does_not_broadcast(op: str, name: str, shape: tuple[int, ...], to: tuple[int, ...]) -> str:
    return (
        f"{op}: {name} of shape {tuple(shape)} does not broadcast to (batch, heads, q_len, "
        f"kv_len) = {tuple(to)}"
    )


def check_mask(op: str, name: str, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: {name} has dtype {mask.dtype}; it must be bool, True = takes part (numbers "
            "that are added to the scores are given as bias)"
        )
    same_device(op, query, **{name: mask})
    shape = scores_shape(query, key)
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(does_not_broadcast(op, name, mask.shape, shape)) from None


def check_bias(op: str, name: str, bias: Tensor, query: Tensor, key: Tensor) -> None:
    if isinstance(bias, Tensor) and bias.dtype not in FLOATS:
        hint = "; a bool tensor is given as mask" if bias.dtype == torch.bool else ""
        raise TypeError(
            f"{op}: {name} has dtype {bias.dtype}; it must be a floating-point dtype"
            f"{hint if op == 'attention' else ' or bool'}"
        )
    is_float(op, **{name: bias})
    same_device(op, query, **{name: bias})
    shape = scores_shape(query, key)
    own = bias.shape
    if len(own) > 4 or any(n != 1 and n != m for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(does_not_broadcast(op, name, own, shape))


def check_window(op: str, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    try:
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(f"{op}: window is {window!r}; it must be (left, right)") from None
    for size in (left, right):
        if size is not None and (not isinstance(size, int) or size < 0):
            raise ValueError(
                f"{op}: window is {window!r}; left and right must be integers, 0 or "
                "more, or None = unbounded"
            )
    return _bounded(left), _bounded(right)


def _bounded(size: int | None) -> int:
    """-1 = unbounded, which is also what exceeds any length: a sum with it must not overflow."""
    return -1 if size is None or size >= 1 << 40 else size


def window_of(left: int, right: int) -> tuple[int | None, int | None]:
    """What :func:`check_window` gave, as the reference takes it."""
    return None if left < 0 else left, None if right < 0 else right


def check_number(op: str, name: str, value: float | None) -> None:
    """TypeError unless ``value`` is None or a number; one that traces counts, a tensor of one
    element too."""
    if value is None or isinstance(value, (int, float)) or hasattr(value, "__float__"):
        return
    raise TypeError(f"{op}: {name} must be a number or None, got {type(value).__name__}")


def check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, int):  # bool is one
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_slopes(op: str, slopes: Tensor, query: Tensor) -> Tensor:
    is_float(op, alibi_slopes=slopes)
    same_device(op, query, alibi_slopes=slopes)
    if slopes.shape != query.shape[:2] and slopes.shape != query.shape[1:2]:
        raise ValueError(
            f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; it must be (heads,) "
            f"= ({query.shape[1]},) or (batch, heads) = {tuple(query.shape[:2])}"
        )
    return slopes


def check_lengths(op: str, lengths: Tensor, query: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{op}: key_lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: key_lengths has dtype {lengths.dtype}; it must be int32 or int64")
    same_device(op, query, key_lengths=lengths)
    if lengths.shape != query.shape[:1]:
        raise ValueError(
            f"{op}: key_lengths has shape {tuple(lengths.shape)}; it must be (batch,) "
            f"= ({query.shape[0]},)"
        )
    return lengths


def check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Without grouped queries, heads must be equal or broadcast."""
    q, k = query.shape[-3], key.shape[-3]
    if q != k and q != 1 and k != 1:
        raise ValueError(
            f"{op}: query has {q} heads, but key has {k}; pass enable_gqa=True if "
            "groups of query heads share one key head"
        )


def flatten(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(batch, heads, sequence, head_dim) views or copies, and the output's leading dimensions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}; it must have two "
                "dimensions or more, (..., sequence, head_dim)"
            )
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (x[(None,) * (rank - x.dim())] for x in (query, key, value))
    if rank < 4:  # no heads: every sequence is a batch entry of its own
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
    elif not enable_gqa:
        check_heads(op, query, key, value)
        if query.shape[-3] == 1 and key.shape[-3] != 1:
            query = query.expand(*query.shape[:-3], *key.shape[-3:-2], *query.shape[-2:])
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions of query {tuple(query.shape)}, key "
            f"{tuple(key.shape)} and value {tuple(value.shape)} do not broadcast"
        ) from None
    leading = tuple(batch) if rank < 4 else (*batch, query.shape[-3])
    count = math.prod(batch)
    query, key, value = (
        x.expand(*batch, *x.shape[-3:]).reshape(count, *x.shape[-3:]) for x in (query, key, value)
    )
    return query, key, value, leading


def flatten_mask(
    op: str, mask: Tensor, leading: tuple[int, ...], query: Tensor, key: Tensor
) -> Tensor:
    """A mask that broadcasts to (*leading, q_len, kv_len) as one of (batch, heads, q_len, kv_len).

    Its own size-1 dimensions behind the batch stay 1, so a copy, where one is needed, is small.
    """
    shape = (*leading, query.shape[2], key.shape[2])
    own = mask.shape
    if len(own) > len(shape) or any(n != 1 and n != m for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(does_not_broadcast(op, "attn_mask", own, shape))
    mask = mask[(None,) * (len(shape) - len(own))]
    if len(shape) < 4:
        mask = mask.unsqueeze(-3)
    batch = leading if len(shape) < 4 else leading[:-1]
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])


def check_softcap(op: str, softcap: float | None) -> None:
    check_number(op, "softcap", softcap)
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive and finite, or None")
    if softcap is not None and not 2.0**-126 <= softcap < 2.0**128:  # 0 or inf in float32
        raise ValueError(f"{op}: softcap is {softcap}; it must be from {2.0**-126:.2g} to 3.4e+38")


def check_sinks(op: str, sinks: Tensor, query: Tensor) -> None:
    is_float(op, sinks=sinks)
    same_device(op, query, sinks=sinks)
    if sinks.shape != query.shape[1:2]:
        raise ValueError(
            f"{op}: sinks has shape {tuple(sinks.shape)}; it must be (heads,) = ({query.shape[1]},)"
        )
