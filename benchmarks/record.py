"""What a run of the benchmark leaves: one JSON schema for every device, read back by the report,
the comparison and the README's tables.

    {"schema": 1, "complete": true, "command": …, "date": …, "environment": {…},
     "ceilings": {name: {"value", "unit"}}, "peers": {name: null, or why it is missing},
     "rows": [{"op", "case", "dtype", "device", "bytes", "flops", "unit", "cold", "along",
               "ceiling": {"name", "value"},
               "candidates": {name: {"seconds", "low", "high", "turns", "rate", "speedup",
                                     "speedup_low", "speedup_high", "wrong"}}}],
     "memory": [{"op", "candidate", "length", "bytes"}]}

``seconds`` is the median of the turns between their quartiles ``low`` and ``high``; ``speedup``
says how many times faster ours was, turn by turn; ``wrong`` how a candidate's result differs; such
a peer has no time.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttransformer.benchmarks._shared import OURS, Case, dtype_name
from fasttransformer.benchmarks.clock import Timing, speedup

SCHEMA = 1


@dataclass
class Figures:
    """One candidate of a row. Without a time where it is wrong or failed."""

    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    turns: int = 0
    rate: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    wrong: str | None = None

    @property
    def verdict(self) -> str:
        """Ours beside this one: "faster", "slower", or "" where the quartiles lie on both sides."""
        if self.speedup_low is None or self.speedup_high is None:
            return ""
        return "faster" if self.speedup_low > 1 else "slower" if self.speedup_high < 1 else ""

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a fraction of the median."""
        if not self.seconds or self.low is None or self.high is None:
            return 0.0
        return (self.high - self.low) / 2 / self.seconds


@dataclass
class Row:
    op: str
    case: str
    dtype: str
    device: str
    bytes: int
    flops: int
    unit: str
    cold: bool
    along: tuple[str, float] | None
    ceiling: tuple[str, float] | None
    candidates: dict[str, Figures]

    @property
    def id(self) -> str:
        return f"{self.op} {self.case} {self.dtype}" + (" cold" if self.cold else "")

    @property
    def ours(self) -> Figures:
        return self.candidates.get(OURS, Figures())

    @property
    def share(self) -> float | None:
        """Ours as a fraction of the machine's ceiling."""
        if self.ceiling is None or self.ours.rate is None:
            return None
        return self.ours.rate / self.ceiling[1]

    @property
    def intensity(self) -> float | None:
        """flops per byte, or None where one of the two is not given."""
        return self.flops / self.bytes if self.flops and self.bytes else None

    @property
    def best_peer(self) -> str | None:
        """The fastest of the others that are right."""
        times = {n: f.seconds for n, f in self.candidates.items() if n != OURS and f.seconds}
        return min(times, key=times.__getitem__) if times else None


@dataclass
class Memory:
    """Peak memory of one forward and backward pass, above what was in use before it."""

    op: str
    candidate: str
    length: int
    bytes: int


@dataclass
class Run:
    environment: dict[str, Any]
    command: str = ""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    complete: bool = False
    warm_pages: bool = True
    ceilings: dict[str, tuple[float, str]] = field(default_factory=dict)
    peers: dict[str, str | None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    @property
    def machine(self) -> str:
        """The machine in words."""
        here = self.environment
        words = [here.get("gpu") or here.get("cpu") or "an unnamed processor"]
        if "gpu" not in here:
            words += [here.get("cpu_isa", ""), f"{here.get('threads', '?')} threads"]
        return ", ".join([*filter(None, words), f"torch {here.get('torch', '?')}"])

    @property
    def ceilings_in_words(self) -> str:
        """The ceilings in a line."""
        return ", ".join(
            f"{name} {value:,.{1 if value < 10 else 0}f} {unit}"
            for name, (value, unit) in self.ceilings.items()
        )


#: Options that say where results go, and what stands for that in a file.
PLACES = {"--json": "FILE", "--report": "DIR"}


def command_line(*words: str) -> str:
    """A command as a file records it: where its results went is nobody else's business.

    >>> command_line("fasttransformer", "bench", "--json", "/home/me/a.json")
    'fasttransformer bench --json FILE'
    """
    said: list[str] = []
    for word in words:
        option, equals, _ = word.partition("=")
        if said and said[-1] in PLACES:
            word = PLACES[said[-1]]
        elif equals and option in PLACES:
            word = f"{option}={PLACES[option]}"
        said.append(word)
    return shlex.join(said)


def row_of(
    case: Case,
    times: Mapping[str, Timing],
    wrong: Mapping[str, str],
    ceiling: tuple[str, float] | None,
) -> Row:
    """A row of a case's times. Peers that are wrong have none."""
    candidates: dict[str, Figures] = {}
    for name, timing in times.items():
        made = Figures(
            timing.median, timing.low, timing.high, timing.turns, case.rate(timing.median)
        )
        if name != OURS and OURS in times:
            ratio = speedup(times[OURS], timing)
            made.speedup, made.speedup_low, made.speedup_high = ratio.median, ratio.low, ratio.high
        candidates[name] = made
    for name, how in wrong.items():
        candidates.setdefault(name, Figures()).wrong = how
    return Row(
        case.op, case.name, dtype_name(case.dtype), case.device, case.bytes, case.flops, case.unit,
        case.cold, case.along, ceiling, candidates,
    )  # fmt: skip


# ---- JSON ---------------------------------------------------------------------------------------


def to_json(run: Run) -> dict[str, Any]:
    made = {"schema": SCHEMA, **dataclasses.asdict(run)}
    made["ceilings"] = {k: {"value": v, "unit": u} for k, (v, u) in run.ceilings.items()}
    for row in made["rows"]:
        if row["ceiling"] is not None:
            row["ceiling"] = dict(zip(("name", "value"), row["ceiling"]))
        row["candidates"] = {
            name: {k: v for k, v in figures.items() if v is not None}
            for name, figures in row["candidates"].items()
        }
    return made


def of_json(made: dict[str, Any]) -> Run:
    made = {k: v for k, v in made.items() if k != "schema"}
    made["ceilings"] = {k: (v["value"], v["unit"]) for k, v in made["ceilings"].items()}
    rows = []
    for row in made["rows"]:
        row = dict(row)
        ceiling = row["ceiling"]
        row["ceiling"] = None if ceiling is None else (ceiling["name"], ceiling["value"])
        row["along"] = None if row["along"] is None else tuple(row["along"])
        row["candidates"] = {n: Figures(**f) for n, f in row["candidates"].items()}
        rows.append(Row(**row))
    made["rows"] = rows
    made["memory"] = [Memory(**m) for m in made["memory"]]
    return Run(**made)


def save(run: Run, path: str | Path) -> None:
    """Writes the file whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(to_json(run), file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def load(path: str | Path) -> Run:
    """Reads what :func:`save` wrote.

    Raises:
        ValueError: in one line, what is wrong with the file.
    """
    try:
        made = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    version = made.get("schema") if isinstance(made, dict) else None
    if version != SCHEMA:
        said = "no schema" if version is None else f"schema {version}"
        raise ValueError(f"{path} has {said}; this version reads schema {SCHEMA}")
    try:
        return of_json(made)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a benchmark of schema {SCHEMA}: {error!r}") from None
