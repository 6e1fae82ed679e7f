"""torch.vmap over attention's operators: the mapped dimension becomes part of the batch.

Where it can't (a gradient per sample of something that the batch shares; dropout, whose mask is a
function of the position in the batch), the samples run one after the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._function import vmap_rule

_OPTIONS = ("mask", "bias", "is_causal", "bottom_right", "window_left", "window_right", "softcap",
            "alibi_slopes", "sinks", "key_lengths", "scale", "dropout_p", "seed")  # fmt: skip
_FORWARD = ("query", "key", "value", *_OPTIONS)
_BACKWARD = ("grad_out", "grad_lse", "query", "key", "value", "out", "lse", *_OPTIONS, "bias_grad",
             "sinks_grad")  # fmt: skip
_VIEWS = ("mask", "bias")  # of the scores' shape, of any strides
#: Of any strides with the last one 1; what remains must be contiguous.
_STRIDED = ("query", "key", "value", "grad_out", "out")
_SHARED = ("sinks", "seed")  # have no batch dimension


def _fold_batch(
    names: tuple[str, ...], operator: Any, count: int, in_dims: tuple, args: tuple
) -> Any:
    given = dict(zip(names, args))
    if given["dropout_p"] > 0.0 or given.get("bias_grad") or given.get("sinks_grad"):
        return None
    if any(dim is not None and name in _SHARED for name, dim in zip(names, in_dims)):
        return None
    folded = []
    for name, x, dim in zip(names, args, in_dims):
        if isinstance(x, Tensor) and name not in _SHARED:
            x = _fold(x, dim, count)
            if name not in _VIEWS and (name not in _STRIDED or x.stride(-1) != 1):
                x = x.contiguous()
        folded.append(x)
    outs = operator(*folded)
    # d_bias and d_sinks, not wanted here, are empty: every sample shares them.
    return (
        tuple(o.unflatten(0, (count, o.shape[0] // count)) if o.dim() > 1 else o for o in outs),
        tuple(0 if o.dim() > 1 else None for o in outs),
    )


def _fold(x: Tensor, dim: int | None, count: int) -> Tensor:
    """(count, batch, ...) as (count * batch, ...); what broadcasts goes on broadcasting."""
    x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    small = x
    for d in range(2, x.dim()):
        if x.stride(d) == 0 and x.shape[d] > 1:
            small = small.narrow(d, 0, 1)
    return small.flatten(0, 1).expand(count * x.shape[1], *x.shape[2:])


@vmap_rule("attention")
def _(operator, count, in_dims, *args):
    return _fold_batch(_FORWARD, operator, count, in_dims, args)


@vmap_rule("attention_backward")
def _(operator, count, in_dims, *args):
    return _fold_batch(_BACKWARD, operator, count, in_dims, args)
