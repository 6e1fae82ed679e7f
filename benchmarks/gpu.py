"""Every kernel on an NVIDIA GPU next to its peers and the card's own ceilings; JSON out.

    python -m fasttransformer.benchmarks.gpu --json results.json [--selection short] [--seconds 150]

Ceilings are measured first, in the same run: a copy (bytes read and written), a read, a bf16 matrix
product, and what a call costs at least. A case is timed by Triton's ``do_bench`` (events, L2
flushed between calls). Peers that are installed join: torch eager and compiled, torch's SDPA
backends by force, FlexAttention, flash-attn, xformers, quack and Liger. A candidate whose result is
not ours is recorded as wrong, one that fails with its error. The cases and their order are in
gpu_cases.py, the file's schema in record.py; it is written after every case.

The measuring runs in a child process. One whose CUDA context was broken by a candidate, or that
makes no progress for ``--each`` seconds, is replaced by a new one, which goes on with the next
candidate; the one that did it is recorded as failing. ``benchmarks/gpu_run.sh`` calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fasttransformer.benchmarks import memory, peers, record, report
from fasttransformer.benchmarks._shared import OURS, Candidate, Case, environment
from fasttransformer.benchmarks.agreement import difference
from fasttransformer.benchmarks.clock import Timing, timing_of
from fasttransformer.benchmarks.gpu_cases import (
    CARD,
    REHEARSAL,
    SELECTIONS,
    TRITON,
    UNLIKE,
    Scale,
    plan,
)

#: Milliseconds of calls that a candidate is timed for.
TIMED = 40
START = 90.0  # seconds that a child may take until its first candidate: imports, ceilings
BROKEN = 75  # a child's exit status when its CUDA context is of no more use

# ---- measuring ----------------------------------------------------------------------------------


def measure(function: Candidate, device: str = "cuda", milliseconds: float = 60) -> Timing:
    if device == "cpu":  # a rehearsal: the times are of no interest
        seconds: list[float] = []
        while sum(seconds) < milliseconds / 1e3:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return timing_of(seconds)
    from triton.testing import do_bench

    times = do_bench(function, warmup=10, rep=milliseconds, return_mode="all")
    return timing_of([t / 1e3 for t in times])


def ceilings(scale: Scale) -> dict[str, tuple[float, str]]:
    """name → (value, unit): the best of five medians."""
    real = scale.device != "cpu"
    source = torch.empty(1 << 30 if real else 1 << 20, device=scale.device, dtype=torch.uint8)
    source.random_()
    target = torch.empty_like(source)
    side = 8192 if real else 128
    a, b = scale.randn(side, side), scale.randn(side, side)

    def best(function: Candidate, work: float) -> float:
        milliseconds = 60 if real else 1
        times = (measure(function, scale.device, milliseconds).median for _ in range(5))
        return work / min(times) / 1e9

    return {
        "copy": (best(lambda: target.copy_(source), 2 * source.numel()), "GB/s"),
        "read": (best(lambda: source.view(torch.int64).sum(), source.numel()), "GB/s"),
        "matmul bf16": (best(lambda: a @ b, 2 * side**3), "GFLOP/s"),
        "operator call": (call_microseconds(scale.device), "µs"),
    }


def call_microseconds(device: str) -> float:
    """Of the processor's time: an operator on one element, launched and not waited for."""
    x, calls = torch.ones(1, device=device), 1000

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    took = 0.0
    for _ in range(2):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            torch.neg(x)
        took = time.perf_counter() - start
    wait()
    return took / calls * 1e6


class Broken(Exception):
    """The CUDA context is of no more use: ``candidate`` did it, as ``reason`` says."""

    def __init__(self, candidate: str, reason: str) -> None:
        super().__init__(reason)
        self.candidate, self.reason = candidate, reason


def _clean_up(device: str) -> None:
    """Frees memory; raises where the context is broken."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def row(
    case: Case,
    limits: dict[str, tuple[float, str]],
    *,
    milliseconds: float = 60,
    known: dict[str, str] | None = None,
    begin: Any = lambda name: None,
) -> record.Row:
    """Measures a case's candidates one after the other, each on inputs of its own from one seed.

    ``known`` holds candidates that an earlier process failed on, and how; ``begin(name)`` is called
    when one begins.

    Raises:
        Broken: the process can't go on.
    """
    times: dict[str, Timing] = {}
    wrong: dict[str, str] = dict(known or {})
    wanted: object = None
    for name, make in case.make().items():
        if name in wrong:
            continue
        begin(name)
        problem = ""
        try:
            torch.manual_seed(0)
            candidate: Any = make()
            result = candidate()
            if name == OURS:
                wanted = result
            elif wanted is not None and case.compared and name not in UNLIKE:
                problem = difference(result, wanted, case.dtype) or ""
            del result
            if not problem:
                times[name] = measure(candidate, case.device, milliseconds)
            del candidate
        except Exception as error:  # a peer's failure is a result; ours too, and it is printed
            problem = f"fails: {type(error).__name__}: {error}"[:300]
        if problem:
            wrong[name] = problem
        try:
            _clean_up(case.device)
        except RuntimeError as error:
            raise Broken(name, problem or f"fails: {error}"[:300]) from error
    which = "copy" if case.memory_bound else "matmul bf16"
    return record.row_of(case, times, wrong, (which, limits[which][0]))


def show(found: record.Row) -> None:
    cells = []
    for name, figures in found.candidates.items():
        text = (figures.wrong or "")[:100]
        if figures.rate is not None and found.ceiling is not None:
            text = f"{figures.rate:.0f} ({figures.rate / found.ceiling[1]:.0%})"
        cells.append(f"{name} {text}")
    print(f"{found.op} {found.case} [{found.unit}]: " + ", ".join(cells), flush=True)


# ---- the child: measures ------------------------------------------------------------------------


class Progress:
    """What a child leaves for its parent next to the results: the candidate that runs now, and the
    candidates that can't be measured."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.now = results.with_name(results.name + ".now")
        self.failed = results.with_name(results.name + ".failed")

    def begin(self, case: str, candidate: str) -> None:
        self.now.write_text(json.dumps([case, candidate]), encoding="utf-8")

    def end(self) -> None:
        """A case is over: what follows until the next may be slow, like an import."""
        self.now.unlink(missing_ok=True)

    def running(self) -> tuple[str, str] | None:
        try:
            case, candidate = json.loads(self.now.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return case, candidate

    def idle_seconds(self, since: float) -> float:
        """Since a candidate began or a case ended; ``since`` where none has."""
        for path in (self.now, self.results):
            try:
                since = max(since, path.stat().st_mtime)
            except OSError:
                pass
        return time.time() - since

    def failures(self) -> dict[str, dict[str, str]]:
        """case → candidate → how."""
        try:
            return json.loads(self.failed.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def fail(self, case: str, candidate: str, how: str) -> None:
        made = self.failures()
        made.setdefault(case, {})[candidate] = how
        self.failed.write_text(json.dumps(made), encoding="utf-8")
        self.now.unlink(missing_ok=True)

    def clear(self) -> None:
        self.now.unlink(missing_ok=True)
        self.failed.unlink(missing_ok=True)


def chosen(args: argparse.Namespace) -> Iterator[Case]:
    for index, case in enumerate(SELECTIONS[args.selection](scale_of(args))):
        if args.rehearse and index == 1:
            case = _with_a_hang(case)
        if not args.only or args.only in case.id:
            yield case


def _with_a_hang(case: Case) -> Case:
    """In a rehearsal one candidate never ends, so that its limit is seen to work."""

    def hang() -> Candidate:
        time.sleep(3600)
        raise AssertionError("slept for an hour")

    return replace(case, make=lambda: {**case.make(), "one that hangs": hang})


def scale_of(args: argparse.Namespace) -> Scale:
    return replace(REHEARSAL if args.rehearse else CARD, compiled=args.compile)


def measure_all(args: argparse.Namespace) -> int:
    """The child: goes on where the file ends, which it writes after every case."""
    scale = scale_of(args)
    made = record.load(args.json) if args.json.exists() else None
    if made is None:
        words = sys.argv[1 : sys.argv.index("--child")]
        command = ["python", "-m", "fasttransformer.benchmarks.gpu", *words]
        made = record.Run(
            environment(), command=record.command_line(*command), ceilings=ceilings(scale),
            peers=peers.available(),
        )  # fmt: skip
        print("ceilings: " + made.ceilings_in_words, flush=True)
    progress = Progress(args.json)
    done = {found.id for found in made.rows}
    made.complete = False
    for case in chosen(args):
        if case.id in done:
            continue
        if time.time() > args.until:
            print(f"stopped before {case.id}: the time was over", flush=True)
            record.save(made, args.json)
            return 0
        try:
            found = row(
                case, made.ceilings, milliseconds=1 if args.rehearse else TIMED,
                known=progress.failures().get(case.id),
                begin=lambda name, case=case: progress.begin(case.id, name),
            )  # fmt: skip
        except Broken as error:
            print(f"{case.id}: {error.candidate} broke the CUDA context: {error}", flush=True)
            progress.fail(case.id, error.candidate, error.reason)
            return BROKEN
        progress.end()
        made.rows.append(found)
        record.save(made, args.json)
        show(found)
    made.complete = True
    record.save(made, args.json)
    return 0


def warm_up(args: argparse.Namespace) -> int:
    """Calls our Triton candidates once, this process's share of them, so that they are compiled.

    Several processes at once compile what one would for minutes, one after the other; the results
    lie in Triton's cache. Lengths between the longest and the next share its kernels.
    """
    number, count = map(int, args.warm.split("of"))
    scale = scale_of(args)
    scale = replace(scale, lengths=scale.lengths[:2])
    cases = [case for case in chosen_at(args, scale) if TRITON in case.make()]
    for case in cases[number::count]:
        began = time.monotonic()
        try:
            call: Any = case.make()[TRITON]()
            call()
            _clean_up(case.device)
            print(f"{case.id}: {time.monotonic() - began:.1f} s", flush=True)
        except Exception as error:  # the benchmark itself will record it
            print(f"{case.id}: {type(error).__name__}: {error}"[:300], flush=True)
    return 0


def chosen_at(args: argparse.Namespace, scale: Scale) -> Iterator[Case]:
    return (c for c in SELECTIONS[args.selection](scale) if not args.only or args.only in c.id)


# ---- the parent: watches ------------------------------------------------------------------------


def watch(args: argparse.Namespace, argv: list[str]) -> int:
    """Starts children until one ends well. Each failure costs one candidate, so this ends."""
    end = time.time() + args.seconds
    progress = Progress(args.json)
    progress.clear()
    args.json.unlink(missing_ok=True)
    while True:
        command = [sys.executable, "-m", __spec__.name, *argv, "--child"]
        command += ["--json", str(args.json), "--until", str(end)]
        began = time.time()
        child = subprocess.Popen(command)
        hung = False
        try:
            while child.poll() is None:
                limit = args.each if progress.running() else max(START, args.each)
                if progress.idle_seconds(began) > limit:
                    hung = True
                    child.kill()
                    child.wait()
                time.sleep(0.1)
        except BaseException:
            child.kill()
            raise
        if child.returncode == 0:
            progress.clear()
            return 0
        running = progress.running()
        if running is None and child.returncode != BROKEN:
            print(f"gpu: ended with {child.returncode} before it measured anything",
                  file=sys.stderr)  # fmt: skip
            return 1
        if running is not None:
            how = (
                f"no end after {args.each:.0f} s"
                if hung
                else f"the process ended: {child.returncode}"
            )
            print(f"{running[0]}: {running[1]}: {how}", flush=True)
            progress.fail(*running, f"fails: {how}")
        if time.time() > end:
            return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every case")
    parser.add_argument("--report", type=Path, metavar="DIR", help="page, pictures and tables")
    parser.add_argument("--selection", choices=tuple(SELECTIONS), default="full")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--compile", action="store_true", help="torch.compile is a peer as well")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop beginning cases then")
    parser.add_argument("--each", type=float, default=20.0, help="seconds a candidate may take")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--estimate", action="store_true", help="say how long it will take and stop"
    )
    parser.add_argument(
        "--warm", metavar="IofN", help="only compile the I-th of N parts for Triton"
    )
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, with a hang")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list:
        for case in chosen(args):
            print(case.id)
        return 0
    if args.estimate:
        print(plan(chosen(args), TIMED / 1e3))
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no NVIDIA GPU here", file=sys.stderr)
        return 2
    if args.warm:
        return warm_up(args)
    if args.child:
        return measure_all(args)
    kept = args.json or Path(f".gpu-{os.getpid()}.json")
    try:
        args.json, wanted = kept, args.json
        status = watch(args, argv)
        if args.report and status == 0:
            made = record.load(kept)
            made.memory = memory.measured(False, scale_of(args).device)
            report.write(made, args.report)
            record.save(made, kept)
    finally:
        if wanted is None:
            kept.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
