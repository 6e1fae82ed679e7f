"""Questions about Python's documentation whose answers stand in it.

Two kinds: what a thing does, whose answer is its definition; and what a function raises, whose
answer is the exception. The context is one to four passages of the documentation, in any order, of
which one has the answer. Of an entry, all questions and all contexts are in one file, and contexts
are put together from entries of that file. The questions that judge are asked once: of two things
with one name, none is asked about.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Sequence

from .documentation import Entry, entries, sentences
from .records import Record
from .summaries import split_entries

_RAISES = re.compile(
    r"\b[Rr]ais\w+ (?:an? |the )?([A-Z]\w*(?:Error|Exception|Warning|Iteration))\b"
)
#: Passages of a context, at most.
_MOST_PASSAGES = 4
#: Words of a passage, and passages of an entry, at most.
_LONGEST, _MOST_OF_ENTRY = 40, 4


def passages_of(entry: Entry) -> list[str]:
    """An entry in pieces of whole sentences, each with the name in front.

    >>> passages_of(Entry("os", "remove", "function", "Remove a file.", "Or raise OSError."))
    ['remove: Remove a file. Or raise OSError.']
    """
    if not entry.name:
        return []
    pieces: list[str] = []
    room = 0
    for sentence in (entry.summary, *sentences(entry.text.replace("\n", " "))):
        words = sentence.split()[:_LONGEST]
        if not pieces or len(words) > room:
            if len(pieces) == _MOST_OF_ENTRY:
                break
            pieces.append(f"{entry.name}:")
            room = _LONGEST
        pieces[-1] += " " + " ".join(words)
        room -= len(words)
    return pieces


def _asked(entry: Entry) -> list[tuple[str, str, str]]:
    """(question, answer, passage that has it)."""
    found = []
    for number, passage in enumerate(passages_of(entry)):
        if number == 0 and entry.kind in ("function", "class") and len(entry.summary) < 120:
            verb = "does {} do" if entry.kind == "function" else "is {}"
            answer = " ".join(entry.summary.split()[:_LONGEST])
            found.append((f"What {verb.format(entry.name)}?", answer, passage))
        raised = _RAISES.findall(passage)
        if len(raised) == 1:
            found.append((f"What does {entry.name} raise?", raised[0], passage))
    return found


def _of(side: Sequence[Entry], rng: random.Random) -> list[Record]:
    all_passages = [passage for entry in side for passage in passages_of(entry)]
    found: list[Record] = []
    for entry in side:
        for question, answer, passage in _asked(entry):
            others = rng.sample(all_passages, min(len(all_passages), _MOST_PASSAGES - 1))
            others = [p for p in others if not p.startswith(f"{entry.name}:")]
            chosen = [passage, *others[: rng.randrange(_MOST_PASSAGES)]]
            rng.shuffle(chosen)
            before = sum(len(p) + 1 for p in chosen[: chosen.index(passage)])
            found.append({
                "question": question, "context": "\n".join(chosen), "answer": answer,
                "start": before + passage.index(answer, len(entry.name)), "passage": passage,
            })  # fmt: skip
    return found


def records(seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, to choose by, held out); ``passage`` is the part of the context that has the
    answer, as :func:`passages` has it.

    >>> train, dev, held_out = records()
    >>> all(r["context"].startswith(r["answer"], r["start"]) for r in train + dev + held_out)
    True
    """
    rng = random.Random(seed)
    sides = [_of(side, rng) for side in split_entries(entries(), seed)]
    times = collections.Counter(record["question"] for side in sides for record in side)
    once = [[r for r in side if times[r["question"]] == 1] for side in sides[1:]]
    return sides[0], *once


def passages() -> list[str]:
    """The passages of all entries, each once, for retrieval."""
    return list(dict.fromkeys(passage for entry in entries() for passage in passages_of(entry)))
