"""A case becomes a row: its candidates are checked against each other, then timed in turns, in
several visits."""

from __future__ import annotations

from fasttransformer.benchmarks import ceilings
from fasttransformer.benchmarks._shared import OURS, REFERENCE, Case
from fasttransformer.benchmarks.agreement import disagreements
from fasttransformer.benchmarks.clock import Timing, joined, time_in_turns
from fasttransformer.benchmarks.memory import hand_back
from fasttransformer.benchmarks.peers import available
from fasttransformer.benchmarks.record import Row, row_of

#: Buffers whose copying is a ceiling of every report.
SIZES = (1 << 20, 1 << 28)


#: How often a run comes back to a case. A neighbour on the machine slows it for seconds, which no
#: number of turns in one visit would show.
VISITS = 3


class Measurement:
    """A case on its way to a row."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._wrong: dict[str, str] = {}
        self._visits: list[dict[str, Timing]] = []

    @property
    def started(self) -> bool:
        return bool(self._visits)

    def visit(self, seconds: float) -> None:
        """Times the candidates for about ``seconds``; the first time it compares their results."""
        candidates = dict(self.case.make())
        if not self.started:
            self._wrong = disagreements(self.case, candidates)
        # A wrong result of ours is timed all the same and shown as wrong: it is no peer to leave
        # out.
        left_out = {REFERENCE, *self._wrong} - {OURS}
        timed = {name: run for name, run in candidates.items() if name not in left_out}
        self._visits.append(
            time_in_turns(timed, seconds, device=self.case.device, cold=self.case.cold, turns=2)
        )
        del candidates, timed
        hand_back()

    def row(self) -> Row:
        """The row of all visits so far."""
        times = {name: joined(v[name] for v in self._visits) for name in self._visits[0]}
        return row_of(self.case, times, self._wrong, _ceiling(self.case))


def _ceiling(case: Case) -> tuple[str, float] | None:
    found = ceilings.ceiling_of(case)
    return None if found is None else (found[1], found[0])


def machine_ceilings() -> dict[str, tuple[float, str]]:
    """name → (value, unit), measured now; what a call costs at least is one of them."""
    made: dict[str, tuple[float, str]] = {}
    if not ceilings.available():
        return made
    made["float32 FMA"] = (ceilings.fma_gflops(), "GFLOP/s")
    if dot := ceilings.dot_gflops():
        made[ceilings.dot_name()] = (dot, "GFLOP/s")
    for size in SIZES:
        label = ceilings.SIZES[size]
        made[f"read {label}"] = (ceilings.read_gbs(size), "GB/s")
        made[f"copy {label}"] = (ceilings.copy_gbs(size), "GB/s")
    made["operator call"] = (ceilings.call_microseconds(), "µs")
    return made


def peers() -> dict[str, str | None]:
    """Each peer that this machine may have: None, or why it is not here."""
    return available()
