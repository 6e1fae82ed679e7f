"""Exact merge of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._front import is_float, needs_grad, same_device, same_dtype

_NONE: frozenset[str] = frozenset()
_GRAD = frozenset({"grad"})


def merge_attention(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention over all keys, from attention over parts of them.

    .. math:: \text{lse} = \log \sum_p e^{\text{lse}_p}, \qquad
        \text{out} = \sum_p e^{\text{lse}_p - \text{lse}}\, \text{out}_p

    Softmax's numerator and denominator are sums over keys, so the merge is exact to rounding. A
    part without any key has lse −inf and counts nothing; where no part has a key, out is 0 and lse
    −inf.

    Args:
        outs: the parts' outputs, each (\*, value_dim): a sequence, or a tensor with the parts in
            front.
        lses: the parts' log-sum-exps, each (\*), float32 (float64 with float64 outputs), as
            ``ft.attention(..., return_lse=True)`` gives them.
        backend: forces one backend for this call.

    Returns:
        (out, lse), in the parts' shapes and dtypes. Both can be differentiated and merged again.

    Raises:
        TypeError: not floating point, dtypes that differ.
        ValueError: no parts, not as many lses as outs, shapes that differ.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867); Dao et al., FlashAttention, 2022 (arXiv:2205.14135).

    >>> import torch, fasttransformer as ft
    >>> ft.merge_attention(torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[0.0], [0.0]]))
    (tensor([[3.]]), tensor([0.6931]))
    """
    op = "merge_attention"
    outs, lses = (_parts(op, name, parts) for name, parts in (("outs", outs), ("lses", lses)))
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"{op}: there are {len(outs)} outs and {len(lses)} lses; it must be as many "
            "of both, one or more"
        )
    first = outs[0]
    if first.dim() == 0:
        raise ValueError(f"{op}: outs[0] has no dimensions; it must be (*, value_dim)")
    wide = torch.promote_types(first.dtype, torch.float32)
    for i, (out, lse) in enumerate(zip(outs, lses)):
        same_device(op, first, **{f"outs[{i}]": out, f"lses[{i}]": lse})
        same_dtype(op, first, **{f"outs[{i}]": out})
        if lse.dtype != wide:
            raise TypeError(
                f"{op}: lses[{i}] has dtype {lse.dtype}; with outs of {first.dtype} it "
                f"must be {wide}"
            )
        if out.shape != first.shape:
            raise ValueError(
                f"{op}: outs[{i}] has shape {tuple(out.shape)}, but outs[0] has "
                f"{tuple(first.shape)}"
            )
        if lse.shape != first.shape[:-1]:
            raise ValueError(
                f"{op}: lses[{i}] has shape {tuple(lse.shape)}; outs[0]'s makes it "
                f"{tuple(first.shape[:-1])}"
            )
    options = _GRAD if needs_grad(*outs, *lses) else _NONE
    choose(op, first.device.type, first.dtype, options, (), backend)
    return reference.merge_attention(outs, lses)


def _parts(op: str, name: str, parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(parts, Tensor):
        is_float(op, **{name: parts})
        if parts.dim() == 0:
            raise ValueError(f"{op}: {name} has no dimensions; the first one is that of the parts")
        return list(parts.unbind())
    parts = list(parts)
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise TypeError(f"{op}: {name}[{i}] must be a tensor, got {type(part).__name__}")
    is_float(op, **{f"{name}[{i}]": part for i, part in enumerate(parts)})
    return parts
