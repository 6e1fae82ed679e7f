"""The clock: candidates timed in turns (A B C, B C A, …), so that what slows the machine slows all.

A time is the median of the turns with their quartiles; two candidates are compared turn by turn,
and their ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fasttransformer.benchmarks._shared import Candidate

#: Bytes read and written before each call of a cold case: several last-level caches.
FLUSHED = 256 << 20
#: A candidate that takes less than this runs once untimed when its turn begins: it finds others'
#: data in the caches, which a longer one hardly feels.
REWARMED = 5e-3


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the turns and their quartiles, and each turn's."""

    median: float
    low: float
    high: float
    seconds: tuple[float, ...] = ()

    @property
    def turns(self) -> int:
        return len(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def timing_of(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of a list of times, or of ratios.

    >>> timing_of([3.0, 1.0, 2.0]).median
    2.0
    """
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], tuple(seconds))
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, tuple(seconds))


def joined(visits: Iterable[Timing]) -> Timing:
    """All turns of several visits.

    >>> joined([timing_of([1.0, 2.0]), timing_of([3.0])]).median
    2.0
    """
    return timing_of([second for visit in visits for second in visit.seconds])


def speedup(ours: Timing, peer: Timing) -> Timing:
    """How many times faster ours is, turn by turn: turns lie side by side, so that what slowed one
    slowed the other.

    >>> speedup(timing_of([1.0, 2.0, 4.0]), timing_of([2.0, 4.0, 8.0])).median
    2.0
    """
    if ours.turns != peer.turns or not ours.turns:
        return timing_of([peer.median / ours.median])
    return timing_of([b / a for a, b in zip(ours.seconds, peer.seconds)])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _sample(function: Candidate, calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


class _Cold:
    """Pushes everything out of the caches before a call; what that takes is not timed."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.zeros(FLUSHED // 4, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def time_in_turns(
    candidates: Mapping[str, Candidate],
    budget: float = 1.0,
    *,
    device: str = "cpu",
    turns: int = 5,
    sample: float = 2e-3,
    cold: bool = False,
) -> dict[str, Timing]:
    """Times the candidates in turns for about ``budget`` seconds in all.

    Each is run twice first (the first run pays for packing, page faults and caches). A turn calls
    a short candidate once untimed and then as often as fills ``sample`` seconds; if ``cold``, once
    after the caches were flushed. There are at least
    ``turns`` turns, unless that would take more than four budgets: then as many as fit, at least
    one.
    """
    flush = _Cold(device) if cold else None
    calls: dict[str, int] = {}
    untimed: set[str] = set()
    once = 0.0
    for name, function in candidates.items():
        warm = _sample(function, 1, device)
        if warm < budget:
            warm = _sample(function, 1, device)
        calls[name] = 1 if cold else max(1, min(10_000, int(sample / max(warm, 1e-7))))
        once += warm * calls[name]
        if not cold and warm < REWARMED:
            untimed.add(name)
            once += warm
        if flush is not None:
            start = time.perf_counter()
            flush()
            _wait(device)
            once += time.perf_counter() - start
    rounds = max(turns, int(budget / once))
    if rounds * once > 4 * budget:
        rounds = max(1, int(4 * budget / once))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            if flush is not None:
                flush()
                _wait(device)
            if name in untimed:
                candidates[name]()
                _wait(device)
            times[name].append(_sample(candidates[name], calls[name], device))
        order.append(order.pop(0))  # nobody always runs right after the same neighbour
    return {name: timing_of(seconds) for name, seconds in times.items()}
