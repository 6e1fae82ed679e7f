"""Held-out records that share nothing with those for training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

R = TypeVar("R")


def fraction_of(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the text alone, the same everywhere.

    >>> fraction_of("text") == fraction_of("text") != fraction_of("text", seed=1)
    True
    """
    digest = hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split(
    records: Sequence[R],
    held_out: float,
    marks: Callable[[R], Iterable[Hashable]],
    seed: int = 0,
) -> tuple[list[R], list[R]]:
    """Records for training and held-out ones, such that no mark is on both sides.

    Args:
        records: in any order, which both lists keep.
        held_out: about what part of the groups is held out, in [0, 1].
        marks: what a record must not share with the other side: its sentences, say. Records that
            share one, or each share one with a third, are a group.
        seed: another choice of groups.

    >>> train, test = split(["ab", "bc", "de", "e", "f"], 0.5, marks=set)
    >>> set("".join(train)) & set("".join(test))
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
    train: list[R] = []
    test: list[R] = []
    for i, record in enumerate(records):
        key = fraction_of(repr(records[root(i)]), seed)
        (test if key < held_out else train).append(record)
    return train, test
