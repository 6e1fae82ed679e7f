"""Choosing the next token of each row: greedy, or drawn from a cut distribution.

Without a penalty the logits are never stored for greedy and top-k choices: linear_topk gives the
probabilities that matter.

Sources: top-k: Fan, Lewis and Dauphin, Hierarchical Neural Story Generation, 2018
(arXiv:1805.04833); top-p: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020
(arXiv:1904.09751); the penalty: Keskar et al., CTRL, 2019 (arXiv:1909.05858), section 4.1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn.lm_head import topk_of
from ..ops.linear_add import linear_add
from ..ops.linear_softmax import linear_softmax
from ..ops.linear_topk import linear_topk
from ..ops.softmax import softmax

#: What top-p looks at first: a trained model's likely tokens are fewer, and the others, which are
#: looked at where they are not, cost a sort of the vocabulary.
LIKELY = 256


@dataclass(frozen=True)
class OutputLayer:
    """The classes of the output layer that may be chosen: a tokenizer can have fewer tokens than
    the model's vocabulary has room for, and only its own make text.

    Args:
        size: how many, from the first on.
        weight, bias: their rows; a weight of None says that ``head`` has to be called.
        head: the layer.
    """

    size: int
    weight: Tensor | None
    bias: Tensor | None
    head: Any

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, size)."""
        if self.weight is None:
            return self.head(hidden)[:, : self.size]
        return linear_add(hidden, self.weight, self.bias)

    def topk(self, hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The ``k`` largest probabilities of each row and their ids."""
        if self.weight is None:
            return topk_of(self.logits(hidden), k, temperature)
        return linear_topk(hidden, self.weight, self.bias, k=k, temperature=temperature)

    def probabilities(self, hidden: Tensor, temperature: float) -> Tensor:
        """Of all classes, (rows, size)."""
        if self.weight is None:
            return softmax(self.logits(hidden).float(), -1, scale=1.0 / temperature)
        return linear_softmax(hidden, self.weight, self.bias, temperature=temperature)


def check_finite(
    call: str, probabilities: Sequence[float], numbers: Sequence[int], what: str = "source"
) -> None:
    """Raises ValueError where a probability is NaN, which a logit that is NaN or infinite makes of
    all of its row: no choice from it would mean anything. ``numbers`` name the rows."""
    # One sum finds it: the check costs a step nothing to speak of.
    if math.isnan(sum(probabilities)):
        number = next(n for n, p in zip(numbers, probabilities) if math.isnan(p))
        raise ValueError(
            f"{call}: the logits of {what} {number} hold NaN or infinity; look for them in the "
            "model's weights, or for values that its dtype can't hold"
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; see :meth:`~fasttransformer.models.generation.Generator.generate`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"generate: temperature is {self.temperature}; it must be positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"generate: top_p is {self.top_p}; it must be in (0, 1]")
        if not self.repetition_penalty > 0.0:
            raise ValueError(
                f"generate: repetition_penalty is {self.repetition_penalty}; it must be positive"
            )

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0


def penalized_logits(head: OutputLayer, hidden: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(rows, vocabulary) float logits, those of tokens that a row has ``seen`` made less likely."""
    logits = head.logits(hidden).float()
    lowered = torch.where(logits > 0.0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def top_probabilities(
    head: OutputLayer, hidden: Tensor, k: int, options: SamplingOptions, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest probabilities of each row in float32, falling, and their ids."""
    k = min(k, head.size)
    if seen is None:
        values, indices = head.topk(hidden, k, options.temperature)
        return values.float(), indices
    logits = penalized_logits(head, hidden, seen, options.repetition_penalty)
    probabilities = softmax(logits, -1, scale=1.0 / options.temperature)
    if k == 1:  # of equal ones the first, as in linear_topk
        return tuple(x[:, None] for x in probabilities.max(-1))  # type: ignore[return-value]
    values, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def choose(
    head: OutputLayer,
    hidden: Tensor,
    options: SamplingOptions,
    seen: Tensor | None,
    uniform: list[float] | None,
) -> tuple[Tensor, Tensor]:
    """(rows,) ids and their probabilities; ``uniform`` has a number in [0, 1) for each row."""
    if uniform is None:
        # A temperature changes no order, and the greedy choice's score is the model's own.
        plain = SamplingOptions(repetition_penalty=options.repetition_penalty)
        best, classes = top_probabilities(head, hidden, 1, plain, seen)
        return classes[:, 0], best[:, 0]
    cut = options.top_k
    indices: Tensor | None
    if cut is not None:
        values, indices = top_probabilities(head, hidden, cut, options, seen)
    elif options.top_p is not None:
        values, indices = top_probabilities(head, hidden, LIKELY, options, seen)
        if not (values.sum(-1) >= options.top_p).all():
            values, indices = top_probabilities(head, hidden, head.size, options, seen)
    else:
        values, indices = _all_probabilities(head, hidden, options, seen), None
    draw = torch.tensor(uniform, dtype=torch.float64, device=hidden.device)
    place = _draw(values, draw, options.top_p, whole=cut is None)
    chosen = place if indices is None else indices.gather(1, place[:, None])[:, 0]
    return chosen, values.gather(1, place[:, None])[:, 0]


def _all_probabilities(
    head: OutputLayer, hidden: Tensor, options: SamplingOptions, seen: Tensor | None
) -> Tensor:
    if seen is None:
        return head.probabilities(hidden, options.temperature)
    logits = penalized_logits(head, hidden, seen, options.repetition_penalty)
    return softmax(logits, -1, scale=1.0 / options.temperature)


def _draw(values: Tensor, draw: Tensor, top_p: float | None, whole: bool) -> Tensor:
    """The place in each row whose share of the row's sum the draw falls into.

    With ``top_p`` the values must fall: the shortest start that holds this share is drawn from, the
    share of 1 where the values are the start of a ``whole`` distribution, else of their sum.
    """
    ends = values.double().cumsum(-1)
    total = ends[:, -1:]
    if top_p is not None:
        total = torch.ones_like(total) if whole else total
        last = (ends < top_p * total).sum(-1, keepdim=True).clamp(max=values.shape[1] - 1)
        total = ends.gather(1, last)
    point = draw[:, None] * total
    return torch.searchsorted(ends, point, right=True)[:, 0].clamp(max=values.shape[1] - 1)


class Draws:
    """Uniform numbers, a stream for each source: what is drawn for one does not hang on which
    others are in its batch, or on when they end."""

    def __init__(self, count: int, seed: int | None, generator: Any) -> None:
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (count,), generator=generator, device=device)
        self._streams = [random.Random(seed) for seed in seeds.tolist()]

    def next(self, sources: list[int]) -> list[float]:
        return [self._streams[source].random() for source in sources]
