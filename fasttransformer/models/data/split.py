"""Parts of the records that share nothing with one another."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

R = TypeVar("R")
#: Of the made records: what options and data are chosen by, and what is reported once. (Until
#: November 2026 the first part was the held-out one, so nothing that was looked at is held out.)
PARTS = (0.1, 0.1)


def fraction_of(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the text alone, the same everywhere.

    >>> fraction_of("text") == fraction_of("text") != fraction_of("text", seed=1)
    True
    """
    digest = hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def side_of(text: str, parts: Sequence[float], seed: int = 0) -> int:
    """The number of the part that a text falls into, from 1 on; 0 for what is left.

    >>> {side_of(str(i), [0.0, 0.5]) for i in range(99)}
    {0, 2}
    """
    place = fraction_of(text, seed)
    ends = itertools.accumulate(parts)
    return next((number for number, end in enumerate(ends, 1) if place < end), 0)


def split(
    records: Sequence[R],
    parts: Sequence[float],
    marks: Callable[[R], Iterable[Hashable]],
    seed: int = 0,
) -> list[list[R]]:
    """The records that are left for training, then those of each part; no mark is in two of them.

    Args:
        records: in any order, which the lists keep.
        parts: about what fraction of the groups each has.
        marks: what a record must not share with the other lists: its sentences, say. Records that
            share one, or each share one with a third, are a group.
        seed: another choice of groups.

    >>> train, held_out = split(["ab", "bc", "de", "e", "f"], [0.5], marks=set)
    >>> set("".join(train)) & set("".join(held_out))
    set()
    """
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[Hashable, int] = {}
    for i, record in enumerate(records):
        for mark in marks(record):
            first = owner.setdefault(mark, i)
            a, b = sorted((root(first), root(i)))
            parent[b] = a
    sides: list[list[R]] = [[] for _ in range(len(parts) + 1)]
    for i, record in enumerate(records):
        sides[side_of(repr(records[root(i)]), parts, seed)].append(record)
    return sides
