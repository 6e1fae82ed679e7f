"""The five tasks: what a record becomes, which model learns it, how its texts are judged.

Each task has a trivial baseline that knows nothing of language. A model that does not beat it on
held-out records has learned nothing worth having.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import metrics
from .classifier import SpanModel, TextClassifier
from .data.records import FIELDS, Record
from .decoder import Decoder
from .encoder import Encoder
from .language_model import LanguageModel
from .metrics import Tally
from .minilm_classifier import HeadConfig, MiniLMClassifier
from .modes import evaluating
from .outputs import TextOutput
from .pretrained import TextModel
from .seq2seq import Seq2SeqModel
from .tokenizer import Tokenizer

Scores = dict[str, float]


@dataclass(frozen=True)
class Example:
    """A record as its model is called with it.

    Attributes:
        inputs: the model's arguments, of this example.
        length: tokens that the model reads, about.
        weight: what the loss is a mean over: predicted tokens, or texts.
    """

    inputs: tuple[Any, ...]
    length: int
    weight: int


class Task:
    """Base of the tasks.

    Attributes:
        name: as on the command line.
        fields: of its records.
        models: classes of model that can do it.
        loss_unit: what the loss is a mean over.
    """

    name: str
    fields: tuple[str, ...]
    models: tuple[type[TextModel], ...]
    loss_unit: str = "token"

    def problem(self, record: Record) -> str | None:
        """What is wrong with a record whose fields are strings, None if nothing is."""
        return None

    def check(self, records: Sequence[Record]) -> str | None:
        """Why these records can't train a model, None if they can."""
        return None

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        """What the tokenizer learns from."""
        for record in records:
            for field in self.fields:
                yield record[field]

    def tokenizer(self, records: Sequence[Record], vocab_size: int) -> Tokenizer | None:
        """A new tokenizer; None where the model needs none."""
        return Tokenizer.train(self.texts(records), vocab_size)

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        """A new model; ``options`` are :class:`~.training.options.TrainingOptions`."""
        raise NotImplementedError

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        """The records encoded."""
        raise NotImplementedError

    def loss(self, model: Any, examples: Sequence[Example]) -> TextOutput:
        """The model's output for a batch."""
        return model(*(list(column) for column in zip(*(x.inputs for x in examples))))

    def predict(self, model: Any, records: Sequence[Record], **options: Any) -> list[str]:
        """The model's text for each record."""
        raise NotImplementedError

    def references(self, records: Sequence[Record]) -> list[str]:
        """The text that a record has."""
        return [record[self.fields[-1]] for record in records]

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        """The task's measures of texts."""
        raise NotImplementedError

    def scores(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return self.tally(predictions, references).scores()

    def measured(self, model: Any, records: Sequence[Record], **options: Any) -> Tally:
        """The task's measures of the model's texts for the records."""
        return self.tally(self.predict(model, records, **options), self.references(records))

    def evaluate(self, model: Any, records: Sequence[Record], **options: Any) -> Scores:
        """The scores of :meth:`measured`."""
        return self.measured(model, records, **options).scores()

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        """Of what needs no model, by name."""
        raise NotImplementedError


class TextToText(Task):
    """Tasks of an encoder and a decoder."""

    models: tuple[type[TextModel], ...] = (Seq2SeqModel,)
    #: The most tokens of an answer where a caller says nothing.
    new_tokens = 64

    def source(self, record: Record) -> str:
        return record[self.fields[0]]

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        config = options.config(tokenizer.vocab_size, share_embeddings=True)
        model = Seq2SeqModel(Encoder.from_config(config), Decoder.from_config(config))
        model.tokenizer = tokenizer
        return model

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        encode = model.tokenizer.encode
        sources = encode(
            [self.source(record) for record in records], eos=True,
            max_length=model.encoder.config.max_length,
        )  # fmt: skip
        targets = encode(self.references(records), eos=True, max_length=model.config.max_length)
        return [Example((s, t), len(s) + len(t), len(t)) for s, t in zip(sources, targets)]

    def predict(self, model: Any, records: Sequence[Record], **options: Any) -> list[str]:
        options.setdefault("max_new_tokens", self.new_tokens)
        return model.generate([self.source(record) for record in records], **options)


class Summarize(TextToText):
    """ROUGE, compared with the text's first words: as many as do best on the training records."""

    name, fields = "summarize", FIELDS["summarize"]

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        return metrics.rouge(predictions, references)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        sample, references = training[:500], self.references(records)

        def lead(some: Sequence[Record], words: int, skip: int) -> list[str]:
            # The first line may be a heading.
            return [" ".join(_lines(record["text"], skip).split()[:words]) for record in some]

        found = {}
        for name, skip in (("lead words", 0), ("lead words after the first line", 1)):
            best = max(
                range(4, 31, 2),
                key=lambda n: self.scores(lead(sample, n, skip), self.references(sample))["rougeL"],
            )
            scores = self.scores(lead(records, best, skip), references)
            found[f"{name} ({best})"] = scores
        return found


def _lines(text: str, skip: int) -> str:
    """The text without its first lines, where there are others."""
    return text.split("\n", skip)[-1]


class Translate(TextToText):
    """BLEU, chrF and equality, compared with the source as it is and the most frequent target."""

    name, fields = "translate", FIELDS["translate"]

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        return metrics.translation(predictions, references)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        references = self.references(records)
        common = _most_frequent(self.references(training))
        return {
            "the source": self.scores([self.source(record) for record in records], references),
            "most frequent": self.scores([common] * len(records), references),
        }


class AnswerText(TextToText):
    """Exact match and F1 of written answers."""

    name, fields = "answer", FIELDS["answer"]

    def source(self, record: Record) -> str:
        return f"{record['question']}\n{record['context']}"

    def read(
        self, model: Any, questions: Sequence[str], contexts: Sequence[str], **options: Any
    ) -> list[tuple[str, float]]:
        """(answer, its probability) for each question."""
        options.setdefault("max_new_tokens", self.new_tokens)
        records = [{"question": q, "context": c} for q, c in zip(questions, contexts)]
        sources = [self.source(record) for record in records]
        answers, scores = model.generate(sources, return_scores=True, **options)
        return [(answer, math.exp(score)) for answer, score in zip(answers, scores)]

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        return metrics.answers(predictions, references)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        return _answer_baselines(self, training, records)


class AnswerSpan(Task):
    """Exact match and F1 of answers that are a piece of the context."""

    name, fields = "answer", FIELDS["answer"]
    models: tuple[type[TextModel], ...] = (SpanModel,)
    loss_unit = "question"

    def problem(self, record: Record) -> str | None:
        if record["answer"] in record["context"]:
            return None
        return (
            f'"answer" {record["answer"][:60]!r} is not a piece of "context" (answers that are not '
            "need --answers text)"
        )

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        model = SpanModel(Encoder.from_config(options.config(tokenizer.vocab_size)))
        model.tokenizer = tokenizer
        return model

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        found = []
        for record in records:
            question, context, answer = (record[field] for field in self.fields)
            start = record.get("start")
            start = context.index(answer) if start is None else start
            span = (start, start + len(answer)) if answer else None
            length = len(model.tokenizer.encode(question + context))
            found.append(Example((question, context, span), length, 1))
        return found

    def predict(self, model: Any, records: Sequence[Record], **options: Any) -> list[str]:
        questions = [record["question"] for record in records]
        contexts = [record["context"] for record in records]
        return [answer for answer, _ in self.read(model, questions, contexts, **options)]

    def read(
        self, model: Any, questions: Sequence[str], contexts: Sequence[str], **options: Any
    ) -> list[tuple[str, float]]:
        """(answer, its probability) for each question."""
        return model.answer(questions, contexts, **options)

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        return metrics.answers(predictions, references)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        return _answer_baselines(self, training, records)


def first_sentence(text: str) -> str:
    """What a reader that knows nothing answers."""
    from .data.documentation import sentences

    return (sentences(text) or [""])[0]


def _answer_baselines(
    task: Task, training: Sequence[Record], records: Sequence[Record]
) -> dict[str, Scores]:
    references = task.references(records)
    first = [first_sentence(record["context"]) for record in records]
    common = _most_frequent(task.references(training))
    return {
        "first sentence": task.scores(first, references),
        "most frequent": task.scores([common] * len(records), references),
    }


class Classify(Task):
    """Accuracy, compared with the most frequent label."""

    name, fields = "classify", FIELDS["classify"]
    models: tuple[type[TextModel], ...] = (TextClassifier, MiniLMClassifier)
    loss_unit = "text"

    def check(self, records: Sequence[Record]) -> str | None:
        labels = {record["label"] for record in records}
        if len(labels) < 2:
            return f"all records have the label {labels.pop()!r}; there must be two or more labels"
        return None

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record["text"] for record in records)

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        labels = _labels(records)
        encoder = Encoder.from_config(options.config(tokenizer.vocab_size))
        model = TextClassifier(encoder, labels=labels)
        model.tokenizer = tokenizer
        return model

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        texts = model.tokenizer.encode(
            [record["text"] for record in records], eos=True, max_length=model.config.max_length
        )
        numbers = self._numbers(model, records)
        return [Example((ids, number), len(ids), 1) for ids, number in zip(texts, numbers)]

    def _numbers(self, model: Any, records: Sequence[Record]) -> list[int]:
        """Of the records' labels."""
        numbers = {label: number for number, label in enumerate(model.config.labels)}
        for record in records:
            if record["label"] not in numbers:
                raise ValueError(
                    f"the label {record['label']!r} is none of the model's, {', '.join(numbers)}"
                )
        return [numbers[record["label"]] for record in records]

    def predict(self, model: Any, records: Sequence[Record], **options: Any) -> list[str]:
        return [label for label, _ in model.predict([record["text"] for record in records])]

    def tally(self, predictions: Sequence[str], references: Sequence[str]) -> Tally:
        return metrics.classes(predictions, references)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        common = _most_frequent(self.references(training))
        return {"most frequent": self.scores([common] * len(records), self.references(records))}


class ClassifyByMiniLM(Classify):
    """The same with a pretrained encoder, whose vectors of all records are made once."""

    def tokenizer(self, records: Sequence[Record], vocab_size: int) -> None:
        return None

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        return MiniLMClassifier(
            HeadConfig(
                _labels(records), options.encoder, options.hidden_dim, options.dropout,
                options.label_smoothing,
            )
        )  # fmt: skip

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        from .retrieval import vectors

        found = vectors([record["text"] for record in records])
        return [Example(pair, 1, 1) for pair in zip(found, self._numbers(model, records))]

    def loss(self, model: Any, examples: Sequence[Example]) -> TextOutput:
        vectors, numbers = zip(*(x.inputs for x in examples))
        return model(torch.stack(vectors), numbers)


def _labels(records: Sequence[Record]) -> list[str]:
    return sorted({record["label"] for record in records})


class Generate(Task):
    """Perplexity, compared with the frequencies of single tokens and of pairs."""

    name, fields = "generate", FIELDS["generate"]
    models: tuple[type[TextModel], ...] = (LanguageModel,)

    def build(self, records: Sequence[Record], tokenizer: Any, options: Any) -> TextModel:
        config = options.config(tokenizer.vocab_size)
        model = LanguageModel.from_configs({"config": config})
        model.tokenizer = tokenizer
        return model

    def examples(self, model: Any, records: Sequence[Record]) -> list[Example]:
        """Long texts in pieces; each begins with the last token of the one before."""
        longest = model.config.max_length
        texts = model.tokenizer.encode([record["text"] for record in records], bos=True, eos=True)
        pieces = [
            ids[first : first + longest]
            for ids in texts
            for first in range(0, len(ids) - 1, longest - 1)
        ]
        return [Example((piece,), len(piece), len(piece) - 1) for piece in pieces]

    def predict(self, model: Any, records: Sequence[Record], **options: Any) -> list[str]:
        options.setdefault("max_new_tokens", 64)
        return model.generate([record["text"] for record in records], **options)

    def measured(self, model: Any, records: Sequence[Record], **options: Any) -> Tally:
        losses = []
        with torch.no_grad(), evaluating(model):
            for record in records:
                output = self.loss(model, self.examples(model, [record]))
                losses.append(float(output.loss_sum))  # type: ignore[arg-type]
        return self._perplexity(model, losses, records)

    def _perplexity(self, model: Any, losses: Sequence[float], records: Sequence[Record]) -> Tally:
        tokens = [sum(x.weight for x in self.examples(model, [record])) for record in records]
        sizes = [len(record["text"].encode("utf-8", "replace")) for record in records]
        return metrics.perplexity(losses, tokens, sizes)

    def baselines(
        self, model: Any, training: Sequence[Record], records: Sequence[Record]
    ) -> dict[str, Scores]:
        single: collections.Counter[int] = collections.Counter()
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        before: collections.Counter[int] = collections.Counter()
        for example in self.examples(model, training):
            ids = example.inputs[0]
            single.update(ids[1:])
            pairs.update(itertools.pairwise(ids))
            before.update(ids[:-1])
        count, size = single.total(), model.tokenizer.vocab_size
        alone, together = [], []
        for record in records:
            one = two = 0.0
            for example in self.examples(model, [record]):
                for first, second in itertools.pairwise(example.inputs[0]):
                    p = (single[second] + 1) / (count + size)
                    # A pair counts as if it had been seen p times more (Dirichlet smoothing).
                    q = (pairs[first, second] + 5.0 * p) / (before[first] + 5.0)
                    one -= math.log(p)
                    two -= math.log(q)
            alone.append(one)
            together.append(two)
        return {
            "frequency of tokens": self._perplexity(model, alone, records).scores(),
            "frequency of pairs": self._perplexity(model, together, records).scores(),
        }


def _most_frequent(texts: Sequence[str]) -> str:
    return collections.Counter(texts).most_common(1)[0][0] if texts else ""


#: name → task; of answer, the one that points.
TASKS: dict[str, Task] = {
    task.name: task for task in (Summarize(), Translate(), AnswerSpan(), Generate(), Classify())
}


def task_of(name: str, answers: str = "span", encoder: str = "scratch") -> Task:
    """The task of this name.

    Args:
        name: one of :data:`TASKS`.
        answers: of the task answer: "span" or "text".
        encoder: of the task classify: "scratch" or "minilm".

    Raises:
        ValueError: there is none.

    >>> task_of("classify").fields
    ('text', 'label')
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; it must be one of {', '.join(TASKS)}")
    if name == "answer" and answers == "text":
        return AnswerText()
    return ClassifyByMiniLM() if name == "classify" and encoder != "scratch" else TASKS[name]
