"""Two runs of the benchmark compared: what got slower or faster by more than its noise.

A row has changed when the ratio of the two times is further from 1 than both runs' spreads added,
and than five percent. Times of another machine say nothing about the code: differences of
the environments come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fasttransformer.benchmarks._shared import OURS
from fasttransformer.benchmarks.record import Row, Run

#: The least change that counts.
LEAST = 0.05
#: What must be the same for a comparison of code.
SURROUNDINGS = ("cpu", "cpu_isa", "threads", "gpu", "torch", "cuda", "python", "system")


@dataclass(frozen=True)
class Change:
    row: Row  # of the new run
    ratio: float  # new time / old time
    noise: float  # the ratio's distance from 1 that noise explains

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        return 1 / self.ratio > 1 + self.noise


def other_surroundings(old: Run, new: Run) -> dict[str, tuple[object, object]]:
    """name → (old, new) of what differs between the machines."""
    pairs = {k: (old.environment.get(k), new.environment.get(k)) for k in SURROUNDINGS}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def changes(old: Run, new: Run, candidate: str = OURS) -> Iterator[Change]:
    """The rows that both runs have, in the new run's order."""
    before = {row.id: row for row in old.rows}
    for row in new.rows:
        if row.id not in before:
            continue
        a, b = before[row.id].candidates.get(candidate), row.candidates.get(candidate)
        if a is None or b is None or not a.seconds or not b.seconds:
            continue
        yield Change(row, b.seconds / a.seconds, max(LEAST, a.spread + b.spread))


def only_in(one: Run, other: Run) -> list[str]:
    """The rows of ``one`` that ``other`` lacks."""
    there = {row.id for row in other.rows}
    return [row.id for row in one.rows if row.id not in there]
