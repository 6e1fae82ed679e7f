"""An encoder with a head: a class for each text, or a span of a text that answers a question."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import Linear
from ..nn.lm_head import head_loss
from ..ops.cross_entropy import cross_entropy
from ..ops.softmax import softmax
from .config import TransformerConfig
from .encoder import Encoder
from .initialization import start_encoder_head
from .modes import evaluating
from .outputs import TextOutput
from .packing import PackedBatch, pack
from .pretrained import TextModel, Texts
from .sampling import check_finite


class Labelled(TextModel):
    """Models that give each text a class; their config has the labels' names."""

    config: Any
    head: Any

    def _classes_of(self, target: Any, count: int) -> Tensor:
        names = self.config.labels
        if not isinstance(target, Tensor):
            numbers = []
            for label in target:
                if isinstance(label, str):
                    if names is None or label not in names:
                        raise ValueError(
                            f"{type(self).__name__}: {label!r} is none of the labels, "
                            f"{', '.join(names or ['(they have no names)'])}"
                        )
                    label = names.index(label)
                numbers.append(label)
            target = torch.tensor(numbers, dtype=torch.long)
        if target.shape != (count,):
            raise ValueError(
                f"{type(self).__name__}: target has shape {tuple(target.shape)}; {count} texts "
                f"need ({count},)"
            )
        return target.to(self.device)

    def _output(self, features: Tensor, target: Any) -> TextOutput:
        """Of the head on a row per text, with the loss where there is a target."""
        loss, count = None, 0
        if target is not None:
            classes = self._classes_of(target, len(features))
            count = len(classes)
            loss = head_loss(
                self.head, features, classes,
                label_smoothing=self.config.label_smoothing if self.training else 0.0,
            )  # fmt: skip
        return TextOutput(loss, features, self.head, count)

    @torch.no_grad()
    def predict(self, texts: Texts, *, batch_size: int = 64) -> list[tuple[Any, float]]:
        """(label, its probability) for each text, without dropout: the label's name, or number
        without names.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        if isinstance(texts, str):
            texts = [texts]
        found: list[tuple[Any, float]] = []
        for start in range(0, len(texts), batch_size):
            with evaluating(self):
                logits = self(texts[start : start + batch_size]).logits.float()
            best = softmax(logits, -1).max(-1)
            values = best.values.tolist()
            check_finite("predict", values, range(start, start + len(values)), "text")
            for value, index in zip(values, best.indices.tolist()):
                found.append((self.config.labels[index] if self.config.labels else index, value))
        return found


class TextClassifier(Labelled):
    r"""Encoder, mean over each text's tokens, linear layer, softmax.

    .. math:: p = \text{softmax}\Big(W\, \frac{1}{n} \sum_{i=1}^{n} h_i + b\Big)

    Args:
        encoder: the stack.
        num_labels: number of classes; the encoder's config says it unless given.
        labels: their names, for :meth:`predict`.

    Called with texts (strings, lists of ids, or a padded tensor (B, L)) and, for a loss, targets:
    class numbers (B,) or names; returns a :class:`~fasttransformer.models.outputs.TextOutput` with
    logits (B, num_labels). transformers' Trainer calls it by ``input_ids``, ``attention_mask`` and
    ``labels``.

    Raises:
        ValueError: an empty batch; a name that is no label; a class outside the labels.

    Source: the mean as in Reimers and Gurevych, Sentence-BERT, 2019 (arXiv:1908.10084), table 6.

    >>> model = TextClassifier(Encoder(260, 32, 64, 1, 4), labels=["bad", "good"]).eval()
    >>> label, probability = model.predict(["fine", "so so"])[0]
    >>> label in ("bad", "good"), 0.5 <= probability <= 1.0
    (True, True)
    """

    def __init__(
        self,
        encoder: Encoder,
        num_labels: int | None = None,
        *,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        config = encoder.config
        if labels is not None:
            config = config.replace(
                labels=list(labels), num_labels=len(labels) if num_labels is None else num_labels
            )
        elif num_labels is not None:
            config = config.replace(num_labels=num_labels)
        self.config = encoder.config = config
        self.encoder = encoder
        self.head = _head(config.embed_dim, config.num_labels)

    def configs(self) -> dict[str, TransformerConfig]:
        return {"encoder": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> TextClassifier:
        return cls(Encoder.from_config(configs["encoder"]))

    def forward(
        self,
        source: Texts = None,
        target: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Any = None,
    ) -> TextOutput:
        """Loss (with a target) and logits."""
        source = input_ids if source is None else source
        target = labels if target is None else target
        if source is None:
            raise ValueError("TextClassifier: source must be given")
        batch = self.packed(
            "source", source, self.config, lengths=lengths, attention_mask=attention_mask
        )
        pooled = self.pooled(batch)
        return self._output(pooled, target)

    def pooled(self, batch: PackedBatch) -> Tensor:
        """The mean of each text's tokens, (B, embed); 0 for a text of no tokens."""
        hidden = self.encoder(batch).hidden
        lengths = batch.lengths_tensor()
        total = torch.segment_reduce(
            hidden.float(), "sum", lengths=lengths.long(), axis=0, initial=0.0
        )
        pooled = (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)
        return F.dropout(pooled, self.config.dropout, self.training)


class SpanModel(TextModel):
    r"""Extractive question answering: where in the context the answer starts and ends.

    .. math:: (s, e) = H W^\top + b, \qquad
        L = -\tfrac12 (\log \text{softmax}(s)_{\text{start}} + \log \text{softmax}(e)_{\text{end}})

    over the tokens of question ``<sep>`` context ``</s>``. A question without an answer in its
    context points to ``</s>``.

    Args:
        encoder: the stack.

    Called with (questions, contexts), lists of strings, and, for a loss, ``spans``: for each the
    (start, end) characters of the answer in the context, or None; returns a
    :class:`~fasttransformer.models.outputs.TextOutput` with logits (B, L, 2), −inf where no answer
    can be.

    Raises:
        ValueError: an empty batch; lists of different lengths; a span outside its context.

    Source: Devlin et al., BERT, 2019 (arXiv:1810.04805), sections 4.2 and 4.3.

    >>> model = SpanModel(Encoder(260, 32, 64, 1, 4))
    >>> context = "Ada wrote the first program."
    >>> model(["Who wrote it?"], [context], [(0, 3)]).logits.shape
    torch.Size([1, 43, 2])
    >>> answer, probability = model.eval().answer(["Who wrote it?"], [context])[0]
    >>> answer in context
    True
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = encoder.config, encoder
        self.head = _head(encoder.config.embed_dim, 2)

    def configs(self) -> dict[str, TransformerConfig]:
        return {"encoder": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> SpanModel:
        return cls(Encoder.from_config(configs["encoder"]))

    def forward(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        spans: Sequence[tuple[int, int] | None] | None = None,
    ) -> TextOutput:
        """Loss (with spans) and logits."""
        batch, offsets = self._joined(questions, contexts)
        hidden = F.dropout(self.encoder(batch).hidden, self.config.dropout, self.training)
        logits = self._masked(self.head(hidden), batch, offsets)
        loss, count = None, 0
        if spans is not None:
            if len(spans) != len(contexts):
                raise ValueError(f"SpanModel: {len(spans)} spans for {len(contexts)} contexts")
            places = torch.tensor(
                [
                    _tokens_of(span, context, places, length)
                    for span, context, places, length in zip(
                        spans, contexts, offsets, batch.lengths
                    )
                ],
                device=logits.device,
            )
            # (B, L, 2) as rows of start scores and rows of end scores
            rows, count = logits.float().transpose(1, 2).flatten(0, 1), len(spans)
            loss = cross_entropy(rows, places.flatten())
        return TextOutput(loss, hidden, lambda _: logits, count)

    @torch.no_grad()
    def answer(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        max_answer_length: int = 32,
        batch_size: int = 32,
    ) -> list[tuple[str, float]]:
        """(answer, its probability) for each question, without dropout; "" where the context has
        none.

        ``max_answer_length`` is in tokens.

        Raises:
            ValueError: scores that are NaN or infinite.
        """
        found = []
        for first in range(0, len(questions), batch_size):
            part = slice(first, first + batch_size)
            batch, offsets = self._joined(questions[part], contexts[part])
            with evaluating(self):
                scores = self.head(self.encoder(batch).hidden)
            logits = self._masked(scores, batch, offsets).float()
            start, end = softmax(logits, 1).unbind(-1)
            pairs = start[:, :, None] * end[:, None, :]
            place = torch.arange(pairs.shape[1], device=pairs.device)
            distance = place[None, :] - place[:, None]
            pairs = pairs * ((distance >= 0) & (distance < max_answer_length))
            best = pairs.flatten(1).max(1)
            values = best.values.tolist()
            check_finite("answer", values, range(first, first + len(values)), "question")
            for i, (value, index) in enumerate(zip(values, best.indices.tolist())):
                s, e = divmod(index, pairs.shape[2])
                tokens = offsets[i]
                skipped = batch.lengths[i] - 1 - len(tokens)
                if s == batch.lengths[i] - 1 or not tokens:
                    found.append(("", value))
                    continue
                e = min(e, batch.lengths[i] - 2)
                text = contexts[part][i]
                found.append((text[tokens[s - skipped][0] : tokens[e - skipped][1]], value))
        return found

    def _joined(
        self, questions: Sequence[str], contexts: Sequence[str]
    ) -> tuple[PackedBatch, list[list[tuple[int, int]]]]:
        """question <sep> context </s>, and the characters of each of the context's tokens. A
        context that is too long loses its end, with a warning; a question, what exceeds half of
        the length."""
        if len(questions) != len(contexts):
            raise ValueError(f"SpanModel: {len(questions)} questions, but {len(contexts)} contexts")
        if not len(questions):
            raise ValueError("SpanModel: questions is an empty batch")
        tokenizer, longest = self.tokenizer, self.config.max_length
        asked = tokenizer.encode(list(questions), max_length=max(longest // 2 - 1, 0))
        rows, offsets, cut = [], [], 0
        for question, context in zip(asked, contexts):
            ids, places = tokenizer.encode_with_offsets(context)
            room = max(longest - len(question) - 2, 0)
            cut += len(ids) > room
            rows.append([*question, tokenizer.sep_id, *ids[:room], tokenizer.eos_id])
            offsets.append(places[:room])
        if cut:
            warnings.warn(
                f"SpanModel: {cut} of {len(rows)} questions with their contexts have more than "
                f"{longest} tokens; the contexts' ends are left out",
                stacklevel=2,
            )
        return pack(rows, self.device), offsets

    def _masked(
        self, scores: Tensor, batch: PackedBatch, offsets: list[list[tuple[int, int]]]
    ) -> Tensor:
        """(B, L, 2) scores, −inf at the question, its <sep> and past the end."""
        padded = batch.padded(scores, -torch.inf)
        context = torch.tensor([len(places) for places in offsets], device=scores.device)
        first = batch.lengths_tensor() - 1 - context
        place = torch.arange(padded.shape[1], device=scores.device)
        return padded.masked_fill((place < first[:, None])[..., None], -torch.inf)


def _tokens_of(
    span: tuple[int, int] | None, context: str, places: list[tuple[int, int]], length: int
) -> tuple[int, int]:
    """The places of a span's first and last token in question <sep> context </s>."""
    nowhere = (length - 1, length - 1)
    if span is None:
        return nowhere
    start, end = span
    if not 0 <= start < end <= len(context):
        raise ValueError(
            f"SpanModel: span ({start}, {end}) is not within its context of {len(context)} "
            "characters"
        )
    inside = [i for i, (first, last) in enumerate(places) if first < end and last > start]
    if not inside or places[-1][1] < end:  # its end was cut off
        return nowhere
    skipped = length - 1 - len(places)
    return skipped + inside[0], skipped + inside[-1]


def _head(features: int, classes: int) -> Linear:
    head = Linear(features, classes)
    start_encoder_head(head)
    return head
