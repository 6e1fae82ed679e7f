"""What a call of a model gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(init=False, repr=False, eq=False)
class TextOutput:
    """Loss and logits of a call; the logits are computed when they are first asked for.

    The loss comes from :func:`fasttransformer.linear_cross_entropy`, which never stores them, so a
    training step that does not read ``logits`` does not pay for them.

    Attributes:
        loss: mean over the predicted tokens (or what the call's ``num_items_in_batch`` divides by);
            ``None`` without targets.
        num_tokens: how many tokens were predicted.
        loss_sum: the sum over them, for exact accumulation: the gradient of
            ``sum(loss_sum) / sum(num_tokens)`` over several batches is that of one large batch.
        logits: (batch, length, vocabulary), 0 past each sequence's end; a classifier's
            (batch, labels).
        hidden: what the logits are computed from: (tokens, features), packed.

    A copy (``copy.deepcopy``) or a pickle has the numbers alone, without their graph.

    It also reads like the tuple (loss, logits), without the loss where there is none, and by name,
    as transformers' Trainer does. It is a dataclass of loss and hidden alone: FSDP2 finds the
    tensors of an output, on which it hangs its backward hooks, by a dataclass's fields (torch 2.13)
    or by pytree (before).
    """

    loss: Tensor | None
    hidden: Tensor

    def __init__(
        self,
        loss: Tensor | None,
        hidden: Tensor,
        logits: Callable[[Tensor], Any],
        num_tokens: int = 0,
        divisor: Any = None,
        guard: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.loss = loss
        self.hidden = hidden
        self.num_tokens = num_tokens
        self._divisor = num_tokens if divisor is None else divisor
        self._compute = logits
        self._logits: Any = None
        self._guard = guard

    @property
    def logits(self) -> Any:
        if self._logits is None:
            self._logits = self._compute(self.hidden)
        return self._logits

    @property
    def loss_sum(self) -> Tensor | None:
        return None if self.loss is None else self.loss * self._divisor

    def keys(self) -> tuple[str, ...]:
        return ("logits",) if self.loss is None else ("loss", "logits")

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        names = self.keys()[key]
        if isinstance(names, str):
            value = getattr(self, names)
            return value if self._guard is None or names != "loss" else self._guard(value)
        return tuple(getattr(self, name) for name in names)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: the numbers, logits included, without graph and model."""
        with torch.no_grad():
            logits = self.logits
        return {
            **self.__dict__,
            "loss": None if self.loss is None else self.loss.detach(),
            "hidden": self.hidden.detach(),
            "_compute": _Known(logits.detach()),
            "_logits": None,
        }

    def __repr__(self) -> str:
        return f"TextOutput(loss={self.loss}, num_tokens={self.num_tokens})"


@dataclass(frozen=True)
class _Known:
    """Logits that have been computed, in the place of what computes them."""

    logits: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.logits


def _flatten(output: TextOutput) -> tuple[list[Any], Any]:
    return [output.loss, output.hidden], (
        output._compute, output.num_tokens, output._divisor, output._guard,
    )  # fmt: skip


def _unflatten(leaves: Any, context: Any) -> TextOutput:
    loss, hidden = leaves
    return TextOutput(loss, hidden, *context)


torch.utils._pytree.register_pytree_node(TextOutput, _flatten, _unflatten)
