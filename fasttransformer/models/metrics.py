"""How good texts are: ROUGE, BLEU and chrF, exact match and F1, accuracy, perplexity.

The measures are those of the known libraries, rouge-score (Google Research) and sacrebleu (Post, A
Call for Clarity in Reporting BLEU Scores, 2018, arXiv:1804.08771), which are imported when they are
needed. All but perplexity are percentages. Each is a function of sums over the records, so that a
bootstrap over the records says how far another sample of as many records might have been off (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import collections
import itertools
import math
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
#: Kana, Thai, Lao, Burmese and Khmer, which like Chinese have no spaces between words.
_UNSPACED = re.compile(
    r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
_INSTALL = "pip install 'fasttransformer[train]'"


class _Words:
    """ROUGE's words in any script. rouge-score's own tokenizer knows a to z and 0 to 9 alone, and
    of such words this gives the same, stemmed by Porter's rules where they are longer than three.
    Others are runs of letters, digits and their marks, or, where a script has no spaces, single
    letters."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text.

        >>> _Words().tokenize("The cats' Кошки 猫が")
        ['the', 'cat', 'кошки', '猫', 'が']
        """
        if text.isascii():
            return self._latin.tokenize(text)
        words: list[str] = []
        for run in _runs(unicodedata.normalize("NFC", text.lower())):
            words += self._latin.tokenize(run) if run.isascii() else [run]
        return words


def _runs(text: str) -> Iterator[str]:
    """Runs of letters, digits and marks; letters of scripts without spaces each with its marks."""
    run, ends = "", False
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind == "M" and run:
            run += character
            continue
        single = bool(_CHINESE.match(character) or _UNSPACED.match(character))
        if run and (ends or single or kind not in "LN"):
            yield run
            run = ""
        if kind in "LNM":
            run, ends = run + character, single
    if run:
        yield run


@dataclass(frozen=True)
class Tally:
    """What a measure needs to know of each record.

    Args:
        rows: for each record numbers that are summed over the records.
        value: the scores of such sums.
        digits: after the point; one unless given.

    >>> answers(["a b", "yes"], ["b", "no"]).scores()
    {'exact': 50.0, 'f1': 50.0}
    """

    rows: Sequence[Sequence[float]]
    value: Callable[[Sequence[float]], dict[str, float]]
    digits: int = 1

    def scores(self) -> dict[str, float]:
        """Of all records; nothing where there is none."""
        if not self.rows:
            return {}
        found = self.value([sum(column) for column in zip(*self.rows)])
        return {name: round(score, self.digits) for name, score in found.items()}

    def intervals(self, samples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """The middle 95 % of each score in samples of as many records, drawn with replacement.

        It speaks of records like these; it does not know that some share a word or a template, nor
        how another training run would have ended.

        >>> low, high = classes(["a"] * 90 + ["b"] * 10, ["a"] * 100).intervals()["accuracy"]
        >>> 80.0 < low < 90.0 < high < 99.0
        True
        """
        if not self.rows:
            return {}
        rows = torch.tensor(self.rows, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(samples):
            drawn = torch.randint(len(rows), (len(rows),), generator=generator)
            for name, score in self.value(rows[drawn].sum(0).tolist()).items():
                found[name].append(score)
        middle = torch.tensor([0.025, 0.975], dtype=torch.float64)
        ends = {}
        for name, scores in found.items():
            low, high = torch.quantile(torch.tensor(scores, dtype=torch.float64), middle).tolist()
            ends[name] = (round(low, self.digits), round(high, self.digits))
        return ends


def _means(**columns: Sequence[float]) -> Tally:
    """The mean of each column, in percent."""

    def value(sums: Sequence[float]) -> dict[str, float]:
        *totals, count = sums
        return {name: 100.0 * total / count for name, total in zip(columns, totals)}

    return Tally([(*row, 1.0) for row in zip(*columns.values())], value)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"metrics: {len(predictions)} predictions, {len(references)} references")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Tally:
    """F-measures of common words, of pairs of words, and of the longest common subsequence (Lin,
    ROUGE, 2004); means over the texts. Words of a to z are stemmed; in other scripts they are runs
    of letters, or single letters where there are no spaces between words (Chinese, Japanese, Thai).

    >>> rouge(["the cat sat"], ["a cat sat"]).scores()["rougeL"]
    66.7
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score: {_INSTALL}") from error
    _check(predictions, references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=_Words())
    found = [scorer.score(r, p) for p, r in zip(predictions, references)]
    return _means(**{name: [x[name].fmeasure for x in found] for name in names})


def translation(predictions: Sequence[str], references: Sequence[str]) -> Tally:
    """BLEU of the whole set, on words, or on characters for references in Chinese ("bleu_zh") or
    another script without spaces ("bleu_char": Japanese, Thai); chrF; and the part that is equal.
    With references of several kinds BLEU has a value for each.

    >>> translation(["二十一", "the third"], ["二十一", "the third"]).scores()["exact"]
    100.0
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(f"BLEU and chrF need sacrebleu: {_INSTALL}") from error
    _check(predictions, references)
    unspaced = [bool(_UNSPACED.search(reference)) for reference in references]
    chinese = [bool(_CHINESE.search(r)) and not other for r, other in zip(references, unspaced)]
    spaced = [not (first or second) for first, second in zip(chinese, unspaced)]
    measures: dict[str, tuple[Any, list[bool]]] = {
        "bleu": (BLEU(tokenize="13a", force=True), spaced),
        "bleu_zh": (BLEU(tokenize="zh", force=True), chinese),
        "bleu_char": (BLEU(tokenize="char", force=True), unspaced),
        "chrf": (CHRF(), [True] * len(chinese)),
    }
    measures = {name: pair for name, pair in measures.items() if any(pair[1])}
    # sacrebleu's corpus scores are functions of sums, too, which it keeps to itself.
    columns = [
        _counts(measure, predictions, references, counted) for measure, counted in measures.values()
    ]
    equal = [float(p.strip() == r.strip()) for p, r in zip(predictions, references)]
    widths = [len(rows[0]) for rows in columns]

    def value(sums: Sequence[float]) -> dict[str, float]:
        scores, first = {}, 0
        for (name, (measure, _)), width in zip(measures.items(), widths):
            part = [int(x) for x in sums[first : first + width]]
            scores[name] = measure._compute_score_from_stats(part).score
            first += width
        return {**scores, "exact": 100.0 * sums[-2] / sums[-1]}

    rows = [[*itertools.chain(*parts), same, 1.0] for *parts, same in zip(*columns, equal)]
    return Tally(rows, value)


def _counts(
    measure: Any, predictions: Sequence[str], references: Sequence[str], counted: Sequence[bool]
) -> list[list[int]]:
    """Of each record what sacrebleu counts in it: n-grams, and those that match."""
    found = measure._extract_corpus_statistics(predictions, [references])
    return [list(row) if counts else [0] * len(row) for row, counts in zip(found, counted)]


def _answer_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation compares them: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answers(predictions: Sequence[str], references: Sequence[str]) -> Tally:
    """Exact match, and F1 of the words (Rajpurkar et al., SQuAD, 2016, arXiv:1606.05250).

    >>> answers(["The tall tower", "yes"], ["tower", "Yes."]).scores()
    {'exact': 50.0, 'f1': 83.3}
    """
    return _means(**_answer_columns(predictions, references))


def found_answers(
    predictions: Sequence[str], references: Sequence[str], ranks: Sequence[int | None]
) -> Tally:
    """The same for answers from many passages, with the part of questions whose passage is the
    first, or among the first five: ``ranks`` are the places of the right ones, from 0 on, None for
    one that was not found.

    >>> found_answers(["tower", "no"], ["tower", "yes"], [0, 3]).scores()
    {'recall_1': 50.0, 'recall_5': 100.0, 'exact': 50.0, 'f1': 50.0}
    """
    recalls = {
        f"recall_{k}": [float(rank is not None and rank < k) for rank in ranks] for k in (1, 5)
    }
    return _means(**recalls, **_answer_columns(predictions, references))


def _answer_columns(
    predictions: Sequence[str], references: Sequence[str]
) -> dict[str, list[float]]:
    _check(predictions, references)
    exact, f1 = [], []
    for prediction, reference in zip(predictions, references):
        given, wanted = _answer_words(prediction), _answer_words(reference)
        exact.append(float(given == wanted))
        common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
        empty = not given and not wanted
        f1.append(1.0 if empty else 2.0 * common / max(len(given) + len(wanted), 1))
    return {"exact": exact, "f1": f1}


def classes(predictions: Sequence[str], references: Sequence[str]) -> Tally:
    """Accuracy, and the mean of each label's F1.

    >>> classes(["a", "b", "b"], ["a", "a", "b"]).scores()
    {'accuracy': 66.7, 'macro_f1': 66.7}
    """
    _check(predictions, references)
    labels = sorted(set(references))

    def value(sums: Sequence[float]) -> dict[str, float]:
        right, named = sums[: len(labels)], sums[len(labels) : -1]
        f1 = [2.0 * r / max(n, 1) for r, n in zip(right, named)]
        return {
            "accuracy": 100.0 * sum(right) / sums[-1],
            "macro_f1": 100.0 * sum(f1) / len(f1),
        }

    rows = [
        [float(p == r == label) for label in labels]
        + [float((p == label) + (r == label)) for label in labels]
        + [1.0]
        for p, r in zip(predictions, references)
    ]
    return Tally(rows, value)


def perplexity(losses: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]) -> Tally:
    """Of each text's summed loss in nats, tokens and bytes: perplexity by token, and bits per byte,
    which do not depend on the tokenizer.

    >>> perplexity([10 * math.log(8.0)], tokens=[10], sizes=[30]).scores()
    {'perplexity': 8.0, 'bits_per_byte': 1.0}
    """

    def value(sums: Sequence[float]) -> dict[str, float]:
        loss, count, size = sums
        return {
            "perplexity": math.exp(min(loss / max(count, 1), 700.0)),
            "bits_per_byte": loss / math.log(2.0) / max(size, 1),
        }

    return Tally(list(zip(losses, tokens, sizes)), value, digits=3)
