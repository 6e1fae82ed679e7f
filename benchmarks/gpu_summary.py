"""The short table of a GPU run: what each stage found, from the files it left.

    python benchmarks/gpu_summary.py DIR

At most 10,000 characters, since of a long output only the end may be seen. Nothing but the standard
library is imported; a file that is missing or cut short is said to be so and stops nothing.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 10_000
OURS = "fasttransformer"


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; the last may have been cut."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def rows_of(path: Path) -> list[list[str]]:
    try:
        return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []


def how(status: str) -> str:
    return {"124": "stopped at its limit", "-": "not started", "0": ""}.get(
        status, f"exit status {status}"
    )


def stages(work: Path) -> Iterator[str]:
    for name, status, seconds in rows_of(work / "stages.tsv"):
        yield f"{name:14} {seconds:>4} s  {how(status) or 'ok'}"


def checks(work: Path, stage: str) -> Iterator[str]:
    """A job a line: how many cases were right, and what was not. One message is said once."""
    seen: set[str] = set()
    waiting = []
    for name, status, _ in rows_of(work / stage / "jobs.tsv"):
        if status == "-":
            waiting.append(name)
            continue
        counts: Counter[str] = Counter()
        notes: list[str] = []
        worst, running = 0.0, ""
        for line in lines_of(work / stage / f"{name}.jsonl"):
            if "started" in line:
                running = line["started"]
            elif "unavailable" in line:
                notes.append(line["unavailable"])
            elif "broken" in line:
                notes.append(f"{line['broken']}: broke the CUDA context")
            elif "status" in line:
                counts[line["status"]] += 1
                worst = max(worst, line["worst"])
                message = line["note"][:60]
                if line["status"] == "finding" and message not in seen:
                    seen.add(message)
                    notes.append(f"{line['case']} {line['dtype']}: {line['note']}")
                running = "" if line["dtype"] == "float16" else running
        said = ", ".join(f"{count} {status_}" for status_, count in sorted(counts.items()))
        text = f"{name:22} {said or 'nothing'}, worst {worst:.2f}"
        if status == "124":
            text += f"; {how(status)}" + (f" in {running!r}" if running else "")
        elif status not in ("0", "1"):
            text += f"; {how(status)}"
        yield text
        yield from (f"    {note[:160]}" for note in notes[:3])
        if len(notes) > 3:
            yield f"    and {len(notes) - 3} more"
    if waiting:
        yield "not started: " + " ".join(waiting)


def probes(work: Path) -> Iterator[str]:
    waiting = []
    for name, status, seconds in rows_of(work / "probes" / "jobs.tsv"):
        if status == "-":
            waiting.append(name)
            continue
        found = next(lines_of(work / "probes" / f"{name}.jsonl"), {})
        if "status" not in found:
            yield f"{name:24} no result: {how(status)}"
            continue
        yield (
            f"{name:24} {found['status']}, {found['checks']} checks, worst {found['worst']:.2f}, "
            f"{seconds} s"
        )
        yield from (f"    {note[:160]}" for note in found["notes"][:2])
    if waiting:
        yield "not started: " + " ".join(waiting)


def tests(work: Path) -> Iterator[str]:
    results = list(lines_of(work / "tests.jsonl"))
    counts = Counter(result["outcome"] for result in results)
    yield (
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no result"
    )
    failed = [result for result in results if result["outcome"] == "failed"]
    for result in failed[:15]:
        last = (result.get("said") or "").strip().splitlines()
        yield f"    {result['test'][-100:]}: {last[-1][:100] if last else ''}"
    if len(failed) > 15:
        yield f"    and {len(failed) - 15} more failed"


def bench(work: Path) -> Iterator[str]:
    try:
        run = json.loads((work / "bench.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield "no result"
        return
    ceilings = {name: made["value"] for name, made in run["ceilings"].items()}
    yield "ceilings: " + ", ".join(f"{n} {v:.0f} {run['ceilings'][n]['unit']}"
                                   for n, v in ceilings.items())  # fmt: skip
    yield "" if run["complete"] else "not complete: the time was over"
    for row in run["rows"]:
        ours = row["candidates"].get(OURS, {})
        others = {n: f for n, f in row["candidates"].items() if n != OURS and "seconds" in f}
        scale = 1e3 if row["unit"] == "GFLOP/s" else 1.0
        unit = "TFLOP/s" if row["unit"] == "GFLOP/s" else row["unit"]
        text = f"{row['op']} {row['case']}: "
        if "rate" in ours:
            share = f" ({ours['rate'] / row['ceiling']['value']:.0%})" if row["ceiling"] else ""
            text += f"{ours['rate'] / scale:.3g} {unit}{share}"
        else:
            text += (ours.get("wrong") or "not measured")[:80]
        for name, figures in sorted(others.items(), key=lambda item: item[1]["seconds"])[:3]:
            text += f"; {name} {figures['rate'] / scale:.3g}"
        yield text


def summary(work: Path) -> str:
    """The whole table; where it is too long, the benchmark's tail goes first."""
    parts: list[str] = []

    def section(title: str, lines: Iterator[str]) -> None:
        parts.extend(["", f"== {title}"])
        try:
            for line in lines:  # one by one, so that what came before an error stays
                parts.extend([line] if line else [])
        except (KeyError, TypeError, ValueError) as error:  # a file of another form
            parts.append(f"{title}: can't be read: {error!r}")

    section("stages", stages(work))
    for stage in ("check-cuda", "check-triton"):
        if (work / stage).exists():
            section(stage, checks(work, stage))
    if (work / "probes").exists():
        section("probes", probes(work))
    if (work / "tests.jsonl").exists():
        section("tests", tests(work))
    if (work / "bench.json").exists():
        section("bench (share of the ceiling; next to the three fastest others)", bench(work))
    text = "\n".join(parts).strip()
    return text if len(text) <= MOST else text[:MOST] + "\n… (the rest is in results.tar.gz)"


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    print(summary(Path(argv[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
