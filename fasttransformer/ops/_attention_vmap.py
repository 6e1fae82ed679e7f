"""torch.vmap over attention: the mapped dimension becomes part of the batch.

Where it can't (a gradient per sample of something that the batch shares, dropout, whose mask is a
function of the position in the batch), the samples run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import TABLE, Kernel, operator_namespaces

_FORWARD_NAMES = (
    "query", "key", "value", "mask", "bias", "is_causal", "bottom_right", "window_left",
    "window_right", "softcap", "alibi_slopes", "sinks", "key_lengths", "scale", "dropout_p", "seed",
)  # fmt: skip
_BACKWARD_NAMES = (
    "grad_out", "grad_lse", "query", "key", "value", "out", "lse", *_FORWARD_NAMES[3:], "bias_grad",
    "sinks_grad",
)  # fmt: skip


def register_vmap(run: Callable[[Kernel, tuple[Any, ...]], tuple[Tensor, Tensor]]) -> None:
    """Registers the rules of both operators on every backend; ``run`` calls a forward kernel."""
    for namespace in operator_namespaces():
        for kernel in TABLE["attention"].values():
            if kernel.forward is None or kernel.forward.namespace != namespace:
                continue
            forward = _rule(_FORWARD_NAMES, lambda *args, kernel=kernel: run(kernel, args))
            torch.library.register_vmap(f"{namespace}::attention", forward)
            if kernel.backward is not None:
                backward = _rule(_BACKWARD_NAMES, kernel.backward)
                torch.library.register_vmap(f"{namespace}::attention_backward", backward)


def _rule(names: tuple[str, ...], call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        count = info.batch_size
        given = dict(zip(names, args))
        mapped = {name for name, dim in zip(names, in_dims) if dim is not None}
        if (
            given["dropout_p"] > 0.0
            or mapped & {"sinks", "seed"}
            or given.get("bias_grad")
            or given.get("sinks_grad")
        ):
            return _one_by_one(call, count, in_dims, args)
        folded = [
            _fold(x, dim, count) if isinstance(x, Tensor) and name not in ("sinks", "seed") else x
            for name, x, dim in zip(names, args, in_dims)
        ]
        outs = call(*folded)
        # d_bias and d_sinks are not wanted here: empty tensors, which every sample shares.
        return (
            tuple(o.unflatten(0, (count, -1)) if o.dim() > 1 else o for o in outs),
            tuple(0 if o.dim() > 1 else None for o in outs),
        )

    return rule


def _fold(x: Tensor, dim: int | None, count: int) -> Tensor:
    """(count, batch, ...) as (count * batch, ...); what broadcasts goes on broadcasting."""
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    small = x
    for d in range(2, x.dim()):
        if x.stride(d) == 0 and x.shape[d] > 1:
            small = small.narrow(d, 0, 1)
    return small.flatten(0, 1).expand(count * x.shape[1], *x.shape[2:])


def _one_by_one(
    call: Callable[..., tuple[Tensor, ...]],
    count: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
) -> Any:
    outs = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)))
        for i in range(count)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*outs))
    return stacked, (0,) * len(stacked)
