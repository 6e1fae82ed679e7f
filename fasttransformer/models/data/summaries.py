"""Summaries of Python's documentation: an entry's first sentence, or title, from the rest.

The text begins with a line of its own: what kind of thing it is, its name in words and its
parameters, as the heading of a page would have them. For training, entries without further text
are used as well: they teach how names and definitions go together. Those that judge have at least
eight words of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .documentation import Entry, entries, sentences
from .records import Record
from .split import PARTS, split

#: Words of text that an entry that judges has at least.
_SHORTEST_TEXT = 8
#: Sentences of so many words or more are in one file alone; shorter ones ("This is not
#: thread-safe.") say nothing of an entry.
_SHORTEST_SHARED = 5


def _marks(entry: Entry) -> Iterator[str]:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    yield plain(entry.summary)
    for paragraph in entry.text.split("\n"):
        for sentence in sentences(paragraph):
            words = plain(sentence)
            if words.count(" ") >= _SHORTEST_SHARED - 1:
                yield words


def split_entries(found: Sequence[Entry], seed: int = 0) -> list[list[Entry]]:
    """Entries for training, to choose by, and held out: no summary and no sentence of five words
    or more is in two of them, whatever its punctuation and case."""
    return split(found, PARTS, _marks, seed)


def record_of(entry: Entry) -> Record:
    """An entry as text and summary.

    >>> record_of(Entry("os", "getcwd", "function", "Say where one is.", "As a string.", ("a",)))
    {'text': 'function getcwd (a)\\nAs a string.', 'summary': 'Say where one is.'}
    """
    parameters = f" ({', '.join(entry.parameters)})" if entry.parameters else ""
    text = f"{entry.heading}{parameters}\n{entry.text}".rstrip()
    return {"text": text, "summary": entry.summary}


def records(seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, to choose by, held out).

    >>> train, dev, held_out = records()
    >>> len(train) > 10 * len(held_out) > 1000
    True
    """
    train, *judging = split_entries(entries(), seed)
    long = [[e for e in side if len(e.text.split()) >= _SHORTEST_TEXT] for side in judging]
    return tuple([record_of(entry) for entry in side] for side in (train, *long))


def texts(seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, to choose by, held out) for a language model: heading, summary and text of an
    entry."""
    sides = split_entries(entries(), seed)

    def whole(entry: Entry) -> Record:
        return {"text": "\n".join(x for x in (entry.heading, entry.summary, entry.text) if x)}

    return tuple([whole(entry) for entry in side] for side in sides)
