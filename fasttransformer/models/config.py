"""What a model is built from: one dataclass, checked when it is made, saved as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from ..ops.linear_add import ACTIVATIONS
from ..reference.feed_forward import GATES

C = TypeVar("C", bound="CheckedOptions")
POSITIONS = ("sinusoidal", "learned", "rotary", "alibi")


class CheckedOptions:
    """Of dataclasses that check themselves when they are made: rules whose messages name the
    option, its value and what it must be."""

    #: in front of a message
    _OF = ""

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._wrong(name, f"an integer, {least} or more")

    def _wrong(self, name: str, rule: str) -> None:
        raise ValueError(f"{self._OF}{name} is {getattr(self, name)!r}; it must be {rule}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Raises ValueError for a name that is no option, and without one that has no default."""
        options = dataclasses.fields(cls)  # type: ignore[arg-type]
        unknown = sorted(values.keys() - {option.name for option in options})
        if unknown:
            raise ValueError(f"{cls._OF}{', '.join(unknown)} is not an option of it")
        for option in options:
            if option.default is dataclasses.MISSING and option.name not in values:
                raise ValueError(f"{cls._OF}{option.name} is missing")
        return cls(**values)


@dataclass
class TransformerConfig(CheckedOptions):
    """The sizes and options of one stack of layers, encoder or decoder.

    Args:
        vocab_size: number of token ids V.
        embed_dim: features C of a token between the layers.
        hidden_dim: features inside the feed-forward block.
        num_layers, num_heads: ``num_heads`` divides ``embed_dim``.
        pre_norm: norms come first in each block (Xiong et al., 2020) and not last.
        positions: ``"sinusoidal"`` and ``"learned"`` are added to the embeddings, ``"rotary"``
            turns queries and keys, ``"alibi"`` lowers scores by distance (in an encoder, distance
            to either side: it does not tell a text from its mirror image).
        activation: of the feed-forward block: relu, gelu, gelu_tanh, silu, swiglu, geglu.
        dropout: probability, in training, where torch's Transformer has it: on attention's weights,
            the hidden features and each block's output; and on the sum of embedding and position.
        max_length: longest sequence; longer text is truncated. The size of the learned table.
        tie_embeddings: the output layer's weight is the embedding's (Press and Wolf, 2017).
        share_embeddings: the encoder's embedding is the decoder's, too; read from the decoder's
            config.
        label_smoothing: of the loss, in [0, 1].
        norm_eps: added to the variance in each norm.
        num_labels: classes of a classifier.
        labels: their names.
        pad_id, bos_id, eos_id: special tokens.

    Raises:
        ValueError: a value out of range; the message has the name, the value and the rule.

    >>> config = TransformerConfig(vocab_size=260, embed_dim=64, hidden_dim=128, num_heads=4)
    >>> TransformerConfig.from_json(config.to_json()) == config
    True
    """

    _OF = "TransformerConfig: "

    vocab_size: int
    embed_dim: int = 512
    hidden_dim: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    pre_norm: bool = False
    positions: str = "sinusoidal"
    activation: str = "relu"
    dropout: float = 0.1
    max_length: int = 1024
    tie_embeddings: bool = True
    share_embeddings: bool = False
    label_smoothing: float = 0.0
    norm_eps: float = 1e-5
    num_labels: int = 2
    labels: list[str] | None = None
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "hidden_dim", "num_heads", "max_length"):
            self._whole(name, 1)
        for name in ("num_layers", "pad_id", "bos_id", "eos_id"):
            self._whole(name, 0)
        self._whole("num_labels", 1)
        for name in ("pre_norm", "tie_embeddings", "share_embeddings"):
            if not isinstance(getattr(self, name), bool):
                self._wrong(name, "True or False")
        if self.embed_dim % self.num_heads:
            self._wrong("embed_dim", f"a multiple of num_heads, {self.num_heads}")
        if self.positions not in POSITIONS:
            self._wrong("positions", f"one of {', '.join(POSITIONS)}")
        if self.positions == "rotary" and self.head_dim % 2:
            self._wrong("embed_dim", "an even multiple of num_heads with rotary positions")
        if self.activation not in ACTIVATIONS and self.activation not in GATES:
            self._wrong("activation", f"one of {', '.join((*ACTIVATIONS, *GATES))}")
        if not 0.0 <= self.dropout < 1.0:
            self._wrong("dropout", "in [0, 1)")
        if not 0.0 <= self.label_smoothing <= 1.0:
            self._wrong("label_smoothing", "in [0, 1]")
        if not (self.norm_eps >= 0.0 and math.isfinite(self.norm_eps)):
            self._wrong("norm_eps", "a finite number, 0 or more")
        if self.labels is not None and len(self.labels) != self.num_labels:
            self._wrong("labels", f"{self.num_labels} names, one for each of num_labels")
        for name in ("pad_id", "bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                self._wrong(name, f"less than vocab_size, {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def pad_token_id(self) -> int:
        """``pad_id`` by transformers' name."""
        return self.pad_id

    def replace(self, **changes: Any) -> TransformerConfig:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TransformerConfig:
        return cls.from_dict(json.loads(text))
