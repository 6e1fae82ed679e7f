"""What a run of training is told: one dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..config import CheckedOptions, TransformerConfig
from ..minilm_classifier import ENCODERS
from ..tokenizer import SMALLEST

#: What may differ when a run goes on: how long it trains, and what it looks at and writes.
CHANGEABLE = ("steps", "save_every", "eval_every", "patience", "device", "shard", "eval_limit")


@dataclass(frozen=True)
class TrainingOptions(CheckedOptions):
    """Options of a run.

    Args:
        task: summarize, translate, answer, generate or classify.
        steps: optimizer steps in all, of a resumed run too.
        batch_size: examples of a forward pass on each process.
        accumulate: forward passes of a step.
        learning_rate: at the end of the warm-up; it falls linearly to 0 after the last step.
        warmup: steps; a tenth of all, at most 500, unless given.
        weight_decay: of AdamW, on matrices alone.
        clip: the largest norm of a gradient; 0 = any.
        seed: of weights, dropout, and the order of examples.
        save_every, eval_every: steps between checkpoints, and between evaluations.
        patience: evaluations without a better loss after which training stops; 0 = never.
        hold_out: part of the data that is kept for evaluation when there is no other.
        eval_limit: the most records that texts are generated for at the end.
        bf16: matrix products in bfloat16, by autocast.
        device: where to.
        shard: of several processes each keeps its part of weights, gradients and the optimizer's
            state alone between the steps (FSDP2), not all (DDP).
        answers: of the task answer: "span" points into the context, "text" writes.
        encoder: of the task classify: "scratch" trains all, "minilm" two layers (of ``hidden_dim``
            features) on the vectors of the pretrained MiniLM, whatever the sizes below.
        vocab_size: the most tokens of the tokenizer that is trained.
        embed_dim, hidden_dim, num_layers, num_heads, pre_norm, positions, activation, dropout,
            max_length, label_smoothing: as of :class:`~fasttransformer.models.TransformerConfig`;
            ``num_layers`` of each stack.

    Raises:
        ValueError: a value out of range; the message has the name, the value and the rule.

    >>> TrainingOptions("classify", steps=100).warmup_steps
    10
    """

    task: str
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    save_every: int = 200
    eval_every: int = 200
    patience: int = 0
    hold_out: float = 0.1
    eval_limit: int = 500
    bf16: bool = False
    device: str = "cpu"
    shard: bool = False
    answers: str = "span"
    encoder: str = "scratch"
    vocab_size: int = 4000
    embed_dim: int = 192
    hidden_dim: int = 512
    num_layers: int = 2
    num_heads: int = 6
    pre_norm: bool = True
    positions: str = "sinusoidal"
    activation: str = "relu"
    dropout: float = 0.1
    max_length: int = 256
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "eval_every"):
            self._whole(name, 1)
        for name in ("patience", "eval_limit"):
            self._whole(name, 0)
        self._whole("vocab_size", SMALLEST)
        self._whole("max_length", 8)
        self._whole("seed", 0)
        if self.warmup is not None:
            self._whole("warmup", 0)
        for name in ("learning_rate", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                self._wrong(name, "a finite number, 0 or more")
        if not 0.0 <= self.hold_out < 1.0:
            self._wrong("hold_out", "in [0, 1)")
        if self.answers not in ("span", "text"):
            self._wrong("answers", "span or text")
        if self.encoder not in ("scratch", *ENCODERS):
            self._wrong("encoder", f"one of scratch, {', '.join(ENCODERS)}")
        if self.encoder != "scratch" and self.task != "classify":
            self._wrong("encoder", f"scratch for the task {self.task}")
        self.config(self.vocab_size)

    @property
    def warmup_steps(self) -> int:
        return min(500, self.steps // 10) if self.warmup is None else self.warmup

    def config(self, vocab_size: int, **changes: Any) -> TransformerConfig:
        """The config of a stack with this many tokens."""
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        own = {name: value for name, value in self.to_dict().items() if name in names}
        return TransformerConfig(**{**own, "vocab_size": vocab_size, **changes})

    def resumed(self, given: dict[str, Any]) -> TrainingOptions:
        """These options of a saved run with what is given now.

        Raises:
            ValueError: something that a run can't change on its way has another value.
        """
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise ValueError(
                    f"{name} is {value!r}, but the run that is resumed has {getattr(self, name)!r}"
                )
        return dataclasses.replace(self, **given)
