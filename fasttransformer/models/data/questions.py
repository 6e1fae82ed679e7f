"""Questions about Python's documentation whose answers stand in it.

Two kinds: what a thing does, whose answer is its definition among those of other things; and what a
function raises, whose answer is the exception in a sentence of its text. Of an entry, all questions
and all contexts are on one side, and contexts are put together from entries of their own side.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .documentation import Entry, entries, sentences
from .records import Record
from .summaries import split_entries

_RAISES = re.compile(
    r"\b[Rr]ais\w+ (?:an? |the )?([A-Z]\w*(?:Error|Exception|Warning|Iteration))\b"
)
#: Definitions of a context.
_CHOICES = 4


def _of(side: Sequence[Entry], rng: random.Random) -> list[Record]:
    named = [e for e in side if e.kind in ("function", "class") and len(e.summary) < 120]
    found: list[Record] = []
    for entry in named:
        others = rng.sample(named, min(_CHOICES - 1, len(named)))
        chosen = [e for e in others if e.name != entry.name] + [entry]
        rng.shuffle(chosen)
        context, start = "", 0
        for e in chosen:
            context += f"{e.name}: "
            start = len(context) if e is entry else start
            context += f"{e.summary} "
        verb = "does {} do" if entry.kind == "function" else "is {}"
        found.append({
            "question": f"What {verb.format(entry.name)}?", "context": context.rstrip(),
            "answer": entry.summary, "start": start,
        })  # fmt: skip
    for entry in side:
        for sentence in sentences(f"{entry.summary} " + entry.text.replace("\n", " ")):
            raised = _RAISES.findall(sentence)
            if entry.name and len(raised) == 1 and len(sentence) < 300:
                found.append({
                    "question": f"What does {entry.name} raise?", "context": sentence,
                    "answer": raised[0],
                })  # fmt: skip
    return found


def records(held_out: float = 0.1, seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, held out).

    >>> train, test = records()
    >>> all(r["answer"] in r["context"] for r in train + test)
    True
    """
    rng = random.Random(seed)
    train, test = split_entries(entries(), held_out, seed)
    return _of(train, rng), _of(test, rng)


def passages() -> list[str]:
    """A passage for each entry with a name, "name: definition", for retrieval."""
    return [f"{e.name}: {e.summary}" for e in entries() if e.name]
