"""``fasttransformer bench``: operations compared with their peers and the machine's own ceilings.

The cases are in ``benchmarks/bench_<op>.py``; how they are timed is in ``benchmarks/clock.py``,
what is written in ``benchmarks/record.py`` and ``benchmarks/report.py``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import benchmarks
from .._arguments import not_one_of
from ..backends import backends
from ..benchmarks import compare, memory, record, report, runner
from ..benchmarks._shared import OURS, Case, environment, keep_allocations
from ._output import UsageError, command, console, escape, progress, require, table

QUICK_SECONDS = 0.25


def operations() -> list[str]:
    """The operations that have a bench file."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return [name.removeprefix("bench_") for name in names if name.startswith("bench_")]


def _cases(args: argparse.Namespace) -> dict[str, list[Case]]:
    known = operations()
    for op in args.ops:
        if op not in known:
            raise UsageError(not_one_of(op, known))
    found: dict[str, list[Case]] = {}
    for op in args.ops or known:
        module = importlib.import_module(f"fasttransformer.benchmarks.bench_{op}")
        cases = module.cases(quick=args.quick)
        if args.filter:
            cases = [case for case in cases if args.filter in case.id]
        if cases:
            found[op] = cases
    if not found:
        raise UsageError(f"--filter: no case has {args.filter!r} in its name; see --list")
    return found


# ---- tables on the terminal ---------------------------------------------------------------------


def _show_op(op: str, rows: list[record.Row]) -> None:
    peers = report.peers_of(rows)
    body = table(op, "dtype", OURS, "of ceiling", *[f"× {p}" for p in peers], right=2)
    for row in rows:
        name = row.case if row.op == op else f"{row.op} {row.case}"
        share = "–"
        if row.share is not None and row.ceiling is not None:
            share = f"{row.share:.0%} of {row.ceiling[1]:.0f} {row.ceiling[0]}"
        body.add_row(
            escape(name) + (", cold" if row.cold else ""),
            row.dtype,
            report.rate_text(row, row.ours),
            share,
            *[_ratio(row.candidates.get(p)) for p in peers],
        )
    console().print(body)
    for row in rows:
        for name, figures in row.candidates.items():
            if figures.wrong:
                console().print(f"[red]{escape(row.id)}: {name} {escape(figures.wrong)}[/]")
    console().print()


def _ratio(figures: record.Figures | None) -> str:
    if figures is None or figures.speedup is None:
        return "[red]wrong[/]" if figures is not None and figures.wrong else "–"
    low, high = figures.speedup_low or 0.0, figures.speedup_high or 0.0
    text = f"{figures.speedup:.2f} ±{(high - low) / 2:.2f}"
    style = {"faster": "green", "slower": "red"}.get(figures.verdict)
    return f"[{style}]{text}[/]" if style else text


def _head(run: record.Run) -> None:
    out = console()
    out.print(escape(run.machine))
    if run.ceilings:
        out.print("ceilings: " + escape(run.ceilings_in_words))
    else:
        out.print(f"ceilings: not measured, {escape(str(backends()['cpu']))}")
    missing = [f"{name} ({why})" for name, why in run.peers.items() if why]
    if missing:
        out.print("[dim]peers that are not here: " + escape(", ".join(missing)) + "[/]")
    out.print(
        "[dim]median of turns ± half the distance of the quartiles; outputs "
        + ("on warm pages" if run.warm_pages else "freshly allocated")
        + "; × = how many times faster than the peer, turn by turn[/]\n"
    )


# ---- running ------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return _compare(*args.compare)
    found = _cases(args)
    if args.list:
        for cases in found.values():
            for case in cases:
                print(case.id)
        return 0
    _writable(args)
    made = record.Run(
        environment(),
        command=record.command_line("fasttransformer", *sys.argv[1:]),
        warm_pages=keep_allocations(),
        ceilings=runner.machine_ceilings(),
        peers=runner.peers(),
    )
    _head(made)
    try:
        _measure(made, found, args)
        if args.report:
            made.memory = memory.measured(args.quick)
        made.complete = True
    except KeyboardInterrupt:
        console().print("[yellow]cut short: what was measured is kept[/]")
    if made.rows:
        made.ceilings = runner.machine_ceilings()  # the best of what cases asked for since
        _write(made, args)
    return 0 if made.complete else 130


def _measure(made: record.Run, found: dict[str, list[Case]], args: argparse.Namespace) -> None:
    """Comes to each case several times; in the last round shows an operation when it is done."""
    seconds = args.seconds or (QUICK_SECONDS if args.quick else 1.0)
    work = {op: [runner.Measurement(case) for case in cases] for op, cases in found.items()}
    shown = set[str]()

    def show(op: str) -> None:
        rows = [one.row() for one in work[op] if one.started]
        if rows and op not in shown:
            shown.add(op)
            made.rows.extend(rows)
            _show_op(op, rows)

    with progress() as bar:
        task = bar.add_task("", total=runner.VISITS * sum(map(len, work.values())))
        try:
            for visit in range(1, runner.VISITS + 1):
                for op, measurements in work.items():
                    for one in measurements:
                        bar.update(task, description=f"{visit}: {one.case.id}")
                        one.visit(seconds / runner.VISITS)
                        bar.advance(task)
                    if visit == runner.VISITS:
                        show(op)
        finally:
            for op in work:
                show(op)


def _writable(args: argparse.Namespace) -> None:
    """Finds out before an hour of measuring whether its result can be drawn and written."""
    if args.report:
        require("matplotlib", "bench", "--report")
    json_folder = args.json and Path(args.json).parent
    for option, folder in (("--json", json_folder), ("--report", args.report)):
        if not folder:
            continue
        try:
            if option == "--report":
                os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"{option}: {folder} can't be written: {error.strerror}") from None
    if args.json and Path(args.json).is_dir():
        raise UsageError(f"--json: {args.json} is a folder")


def _write(made: record.Run, args: argparse.Namespace) -> None:
    try:
        if args.json:
            record.save(made, args.json)
        if args.report:
            # First the numbers, whatever becomes of the pictures.
            record.save(made, Path(args.report) / "results.json")
            report.write(made, args.report)
            console().print(f"report: {escape(str(Path(args.report) / 'index.html'))}")
    except OSError as error:
        raise UsageError(f"{error.filename} can't be written: {error.strerror}") from None


# ---- comparing ----------------------------------------------------------------------------------


def _compare(old_file: str, new_file: str) -> int:
    """Prints what changed; 0 whether or not something got slower."""
    try:
        old, new = record.load(old_file), record.load(new_file)
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from None
    out = console()
    for name, (before, after) in compare.other_surroundings(old, new).items():
        out.print(f"[yellow]another {name}: {escape(str(before))} → {escape(str(after))}[/]")
    found = list(compare.changes(old, new))
    if not found:
        raise UsageError(f"--compare: {old_file} and {new_file} have no case in common")
    changed = [c for c in found if c.slower or c.faster]
    body = table("case", "new / old time", "noise", right=1)
    for change in sorted(changed, key=lambda c: -c.ratio):
        style = "red" if change.slower else "green"
        ratio = f"[{style}]{change.ratio:.2f}[/]"
        body.add_row(escape(change.row.id), ratio, f"±{change.noise:.2f}")
    if changed:
        out.print(body)
    slower = sum(c.slower for c in changed)
    out.print(
        f"{len(found)} cases compared: {slower} slower, {len(changed) - slower} faster, "
        f"{len(found) - len(changed)} within their noise"
    )
    for one, other, which in ((old, new, "old"), (new, old, "new")):
        alone = compare.only_in(one, other)
        if alone:
            out.print(f"[dim]only in the {which} run: {len(alone)} cases[/]")
    return 0


# ---- command line -------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "bench",
        "operations against their peers, as a rate and as a fraction of the machine's own ceiling",
        "  fasttransformer bench --quick\n"
        "  fasttransformer bench softmax attention --report out\n"
        "  fasttransformer bench linear_add --filter bfloat16\n"
        "  fasttransformer bench --compare old.json new.json\n"
        "  fasttransformer bench --list\n",
    )  # fmt: skip
    parser.add_argument("ops", metavar="OP", nargs="*", help="default: all that have a benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--filter", metavar="TEXT", help="only the cases whose name has TEXT")
    parser.add_argument("--seconds", type=_positive, metavar="S",
                        help=f"for each case (default 1, --quick {QUICK_SECONDS})")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write every time and rate there")
    parser.add_argument("--report", metavar="DIR",
                        help="write a page with pictures and tables there")  # fmt: skip
    parser.add_argument("--compare", metavar=("OLD", "NEW"), nargs=2,
                        help="two JSON files: what got slower or faster")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
