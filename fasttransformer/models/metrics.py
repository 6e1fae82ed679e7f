"""How good texts are: ROUGE, BLEU and chrF, exact match and F1, accuracy, perplexity.

The measures are those of the known libraries, rouge-score (Google Research) and sacrebleu (Post, A
Call for Clarity in Reporting BLEU Scores, 2018, arXiv:1804.08771), which are imported when they are
needed. All but perplexity are percentages.
"""

from __future__ import annotations

import collections
import math
import re
import string
from collections.abc import Sequence
from typing import Any

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_INSTALL = "pip install 'fasttransformer[train]'"


class _Words:
    """rouge-score's tokenizer for texts that its own has no words for: each Chinese character is a
    word, others are runs of letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+",
                          text.lower())  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / max(len(values), 1)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"metrics: {len(predictions)} predictions, {len(references)} references")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F-measures of common words, of pairs of words, and of the longest common subsequence, words
    stemmed (Lin, ROUGE, 2004); means over the texts.

    >>> rouge(["the cat sat"], ["a cat sat"])["rougeL"]
    66.7
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score: {_INSTALL}") from error
    _check(predictions, references)
    names = ["rouge1", "rouge2", "rougeL"]
    own = _Words() if any(_CHINESE.search(text) for text in references) else None
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=own)
    found = [scorer.score(r, p) for p, r in zip(predictions, references)]
    return {name: round(_mean([x[name].fmeasure for x in found]), 1) for name in names}


def translation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of the whole set, on words, or for Chinese references on characters; chrF; and the part
    that is equal. With references in both languages BLEU has a value for each.

    >>> translation(["二十一", "the third"], ["二十一", "the third"])["exact"]
    100.0
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(f"BLEU and chrF need sacrebleu: {_INSTALL}") from error
    _check(predictions, references)
    found: dict[str, float] = {}
    chinese = [bool(_CHINESE.search(reference)) for reference in references]
    for name, kind, tokenize in (("bleu", False, "13a"), ("bleu_zh", True, "zh")):
        chosen = [i for i, is_chinese in enumerate(chinese) if is_chinese == kind]
        if chosen:
            score: Any = sacrebleu.corpus_bleu(
                [predictions[i] for i in chosen], [[references[i] for i in chosen]],
                tokenize=tokenize, force=True,
            )  # fmt: skip
            found[name] = round(score.score, 1)
    score = sacrebleu.corpus_chrf(list(predictions), [list(references)])
    found["chrf"] = round(score.score, 1)
    equal = [p.strip() == r.strip() for p, r in zip(predictions, references)]
    return {**found, "exact": round(_mean(equal), 1)}


def _answer_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation compares them: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answers(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match, and F1 of the words (Rajpurkar et al., SQuAD, 2016, arXiv:1606.05250).

    >>> answers(["The tall tower", "yes"], ["tower", "Yes."])
    {'exact': 50.0, 'f1': 83.3}
    """
    _check(predictions, references)
    exact, f1 = [], []
    for prediction, reference in zip(predictions, references):
        given, wanted = _answer_words(prediction), _answer_words(reference)
        exact.append(given == wanted)
        common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
        empty = not given and not wanted
        f1.append(1.0 if empty else 2.0 * common / max(len(given) + len(wanted), 1))
    return {"exact": round(_mean(exact), 1), "f1": round(_mean(f1), 1)}


def classes(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Accuracy, and the mean of each label's F1.

    >>> classes(["a", "b", "b"], ["a", "a", "b"])
    {'accuracy': 66.7, 'macro_f1': 66.7}
    """
    _check(predictions, references)
    pairs = list(zip(predictions, references))
    f1 = []
    for label in sorted(set(references)):
        right = sum(p == r == label for p, r in pairs)
        f1.append(2.0 * right / sum((p == label) + (r == label) for p, r in pairs))
    accuracy = _mean([p == r for p, r in pairs])
    return {"accuracy": round(accuracy, 1), "macro_f1": round(_mean(f1), 1)}


def perplexity(loss: float, tokens: int, characters: int) -> dict[str, float]:
    """Of a mean loss per token in nats; and bits per byte of text, which do not depend on the
    tokenizer.

    >>> perplexity(math.log(8.0), tokens=10, characters=30)
    {'perplexity': 8.0, 'bits_per_byte': 1.0}
    """
    bits = loss / math.log(2.0) * tokens / max(characters, 1)
    return {"perplexity": round(math.exp(min(loss, 700.0)), 2), "bits_per_byte": round(bits, 3)}
