"""A class for each text by the vectors of a pretrained encoder, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..nn import Linear
from ..nn.linear import activated_linear
from .classifier import Labelled
from .config import CheckedOptions
from .outputs import TextOutput

#: encoder → features of its vectors
ENCODERS = {"minilm": 384}


@dataclass
class HeadConfig(CheckedOptions):
    """What is trained on the vectors of a pretrained encoder.

    Args:
        labels: their names, two or more.
        encoder: ``"minilm"``.
        hidden_dim: features between the two layers.
        dropout: probability, in training, on the vectors and on the hidden features.
        label_smoothing: of the loss, in [0, 1].

    Raises:
        ValueError: a value out of range; the message has the name, the value and the rule.

    >>> HeadConfig(["bad", "good"]).hidden_dim
    512
    """

    _OF = "HeadConfig: "

    labels: list[str]
    encoder: str = "minilm"
    hidden_dim: int = 512
    dropout: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.labels, list) or len(self.labels) < 2:
            self._wrong("labels", "a list of two or more names")
        if self.encoder not in ENCODERS:
            self._wrong("encoder", f"one of {', '.join(ENCODERS)}")
        self._whole("hidden_dim", 1)
        if not 0.0 <= self.dropout < 1.0:
            self._wrong("dropout", "in [0, 1)")
        if not 0.0 <= self.label_smoothing <= 1.0:
            self._wrong("label_smoothing", "in [0, 1]")


class MiniLMClassifier(Labelled):
    r"""Pretrained MiniLM, which is not trained further, and two layers on its vectors, which are.

    .. math:: p = \text{softmax}\big(W_2 \max(0, W_1 \sqrt{d}\, v + b_1) + b_2\big), \qquad
        v = \frac{\sum_i h_i}{\|\sum_i h_i\|}

    with the encoder's :math:`d = 384` features. It knows words that training never had, which no
    model from scratch can. The encoder is not saved: the folder has its name and the two layers.

    Args:
        config: labels, size and dropout.

    Called with texts or their vectors (B, 384), which
    :func:`~fasttransformer.models.retrieval.vectors` makes, and, for a loss, targets as of
    :class:`~fasttransformer.models.TextClassifier`; returns a
    :class:`~fasttransformer.models.outputs.TextOutput` with logits (B, labels).

    Raises:
        fasttransformer.benchmarks.minilm.Missing: texts, and the encoder is not installed.
        ValueError: an empty batch; vectors of another size; a name that is no label.

    Source: the vectors of Reimers and Gurevych, Sentence-BERT, 2019 (arXiv:1908.10084), section 5
    (SentEval), where a classifier is trained on them.

    >>> import torch
    >>> model = MiniLMClassifier(HeadConfig(["bad", "good"])).eval()
    >>> model(torch.randn(3, 384), ["bad", "good", "good"]).logits.shape
    torch.Size([3, 2])
    """

    _config_class: ClassVar[type[CheckedOptions]] = HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = Linear(ENCODERS[config.encoder], config.hidden_dim)
        self.head = Linear(config.hidden_dim, len(config.labels))

    def configs(self) -> dict[str, Any]:
        return {"head": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, Any]) -> MiniLMClassifier:
        return cls(configs["head"])

    def forward(self, source: Sequence[str] | Tensor, target: Any = None) -> TextOutput:
        """Loss (with a target) and logits."""
        vectors, features = source, ENCODERS[self.config.encoder]
        if not isinstance(vectors, Tensor):
            from .retrieval import vectors as vectors_of

            vectors = vectors_of([vectors] if isinstance(vectors, str) else list(vectors))
        if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != features:
            raise ValueError(
                f"MiniLMClassifier: source has shape {tuple(vectors.shape)}; it must be "
                f"(texts, {features}) with one text or more"
            )
        # A unit vector's features have the size of 1/√d, which layers start far too small for.
        scaled = vectors.to(self.device, next(self.parameters()).dtype) * features**0.5
        dropped = F.dropout(scaled, self.config.dropout, self.training)
        p = self.config.dropout if self.training else 0.0
        hidden = activated_linear(self.inner, dropped, "relu", p)
        return self._output(hidden, target)
