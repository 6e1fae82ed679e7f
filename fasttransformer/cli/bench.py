"""``fasttransformer bench``: operations beside their peers and the machine's own ceilings.

The cases are in ``benchmarks/bench_<op>.py``; how they are timed is in ``benchmarks/_shared.py``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from .. import benchmarks
from ..backends import backends
from ..benchmarks import ceilings
from ..benchmarks._shared import (
    OURS,
    Case,
    dtype_name,
    environment,
    keep_allocations,
)
from ..benchmarks.clock import Timing, time_in_turns
from ._output import UsageError, command, console, escape, progress, table, write_json


def operations() -> list[str]:
    """The operations that have a bench file."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return [name.removeprefix("bench_") for name in names if name.startswith("bench_")]


def _cases(args: argparse.Namespace) -> dict[str, list[Case]]:
    known = operations()
    for op in args.ops:
        if op not in known:
            raise UsageError(f"{op!r} has no benchmark; there are: {', '.join(known)}")
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


def _json_of(case: Case, times: Mapping[str, Timing], ceiling: tuple[float, str] | None) -> dict:
    return {
        "op": case.op,
        "case": case.name,
        "dtype": dtype_name(case.dtype),
        "device": case.device,
        "bytes": case.bytes,
        "flops": case.flops,
        "unit": case.unit,
        "ceiling": None if ceiling is None else {"name": ceiling[1], "value": ceiling[0]},
        "candidates": {
            name: {
                "seconds": timing.median,
                "low": timing.low,
                "high": timing.high,
                "turns": timing.turns,
                "rate": case.rate(timing.median),
            }
            for name, timing in times.items()
        },
    }


def _rate(case: Case, timing: Timing) -> str:
    rate = case.rate(timing.median)
    digits = 1 if rate < 100 else 0
    return f"{rate:.{digits}f} {case.unit} ±{timing.spread:.0%}"


Row = tuple[Case, Mapping[str, Timing], "tuple[float, str] | None"]


def _show_op(op: str, rows: list[Row]) -> None:
    peers = list(dict.fromkeys(name for _, times, _ in rows for name in times if name != OURS))
    body = table(op, "dtype", OURS, "of ceiling", *peers, *[f"× {p}" for p in peers], right=2)
    for case, times, ceiling in rows:
        ours = times[OURS]
        share = "–"
        if ceiling is not None:
            share = f"{case.rate(ours.median) / ceiling[0]:.0%} of {ceiling[0]:.0f} {ceiling[1]}"
        speed = {name: times[name].median / ours.median for name in peers if name in times}
        body.add_row(
            escape(case.name),
            dtype_name(case.dtype),
            _rate(case, ours),
            share,
            *[_rate(case, times[p]) if p in times else "–" for p in peers],
            *[_ratio(speed.get(p)) for p in peers],
        )
    console().print(body)
    console().print()


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    style = "green" if value >= 1 else "red"
    return f"[{style}]{value:.2f}[/]"


def run(args: argparse.Namespace) -> int:
    found = _cases(args)
    if args.list:
        for cases in found.values():
            for case in cases:
                print(case.id)
        return 0
    here = environment()
    kept = keep_allocations()
    out = console()
    out.print(
        f"{escape(here['cpu'])}, {here.get('cpu_isa', 'no C++ kernels')}, {here['threads']} "
        f"threads, torch {here['torch']}" + (f", {escape(here['gpu'])}" if "gpu" in here else "")
    )
    if ceilings.available():
        dot = ceilings.dot_gflops()
        out.print(
            f"ceilings: float32 FMA {ceilings.fma_gflops():.0f} GFLOP/s, bf16 dot "
            + (f"{dot:.0f} GFLOP/s" if dot else "none")
            + f"; copy {ceilings.copy_gbs(1 << 20):.0f} GB/s in cache (1 MiB), "
            f"{ceilings.copy_gbs(1 << 28):.0f} GB/s in memory (256 MiB)"
        )
    else:
        out.print(f"ceilings: not measured, {escape(str(backends()['cpu']))}")
    out.print(
        "[dim]median of turns ± half the distance of the quartiles; outputs "
        + ("on warm pages" if kept else "freshly allocated")
        + "; × = how many times faster than the peer in the same run[/]\n"
    )
    results = []
    total = sum(map(len, found.values()))
    with progress() as bar:
        task = bar.add_task("benchmarking", total=total)
        for op, cases in found.items():
            rows = []
            for case in cases:
                bar.update(task, description=case.id)
                times = time_in_turns(
                    case.make(), 0.3 if args.quick else args.seconds, device=case.device
                )
                ceiling = ceilings.ceiling_of(case)
                rows.append((case, times, ceiling))
                results.append(_json_of(case, times, ceiling))
                bar.advance(task)
            _show_op(op, rows)
    if args.json:
        write_json(args.json, {"environment": here, "warm_pages": kept, "results": results})
    return 0


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "bench",
        "operations beside their peers, as a rate and as a fraction of the machine's own ceiling",
        "  fasttransformer bench --quick\n"
        "  fasttransformer bench softmax attention --json results.json\n"
        "  fasttransformer bench linear_add --filter bfloat16\n"
        "  fasttransformer bench --list\n",
    )  # fmt: skip
    parser.add_argument("ops", metavar="OP", nargs="*", help="default: all that have a benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--filter", metavar="TEXT", help="only the cases whose name has TEXT")
    parser.add_argument("--seconds", type=_positive, default=1.0, metavar="S",
                        help="time for each case (default 1)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write every time and rate there")
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
