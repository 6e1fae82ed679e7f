"""Runs one command per name, several at a time, each in a process of its own with a time limit.

    python benchmarks/gpu_jobs.py --out DIR --seconds 35 --each 20 --at-once 8 \\
        --command "python -m fasttransformer.benchmarks.gpu_check {name} cuda" < names

An error that breaks a process's CUDA context, or a kernel that never ends, then costs one job and
not the others. What a job prints goes to DIR/<name>.jsonl as it comes, its errors to
DIR/<name>.err, and DIR/jobs.tsv gets a line (name, exit status, seconds) when a job ends: 124 is
one that was stopped at its limit, "-" one that was never started. Names are read from the standard
input; jobs start in that order, so the longest belong first. Nothing but the standard library is
imported, so that the stage begins at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType

GRACE = 1.0  # seconds between the two signals that stop a job
STOPPED = 124  # the exit status of a job that was stopped, as timeout(1) has it


class Job:
    def __init__(self, name: str, command: str, out: Path, threads: int) -> None:
        self.name, self.began = name, time.monotonic()
        self.stopped_at: float | None = None
        words = [name if word == "{name}" else word for word in shlex.split(command)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with (out / f"{name}.jsonl").open("wb") as lines, (out / f"{name}.err").open("wb") as said:
            # A session of its own, so that a job's own children are stopped with it.
            self.process = subprocess.Popen(
                words, stdout=lines, stderr=said, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def stop(self) -> None:
        """Asks it to end, and a second later makes it end; to be called until it has ended."""
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
            self.signal(signal.SIGTERM)
        elif time.monotonic() - self.stopped_at > GRACE:
            self.signal(signal.SIGKILL)


def run_all(
    names: list[str], command: str, out: Path, *, at_once: int, each: float, seconds: float
) -> dict[str, int]:
    """name → exit status of each job, for at most ``seconds`` in all."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    waiting, running, status = deque(names), list[Job](), dict[str, int]()
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    before = signal.signal(signal.SIGTERM, interrupt)
    with (out / "jobs.tsv").open("w", encoding="utf-8", buffering=1) as log:
        try:
            while waiting or running:
                over = interrupted or time.monotonic() > end
                while waiting and not over and len(running) < at_once:
                    running.append(Job(waiting.popleft(), command, out, threads))
                for job in list(running):
                    code = job.process.poll()
                    if code is None:
                        if over or job.seconds > each:
                            job.stop()
                        continue
                    job.signal(signal.SIGKILL)  # whatever it left running
                    running.remove(job)
                    status[job.name] = code if job.stopped_at is None else STOPPED
                    log.write(f"{job.name}\t{status[job.name]}\t{job.seconds:.1f}\n")
                if over and not running:
                    break
                time.sleep(0.05)
            for name in waiting:
                log.write(f"{name}\t-\t0\n")
                status[name] = STOPPED
        finally:
            signal.signal(signal.SIGTERM, before)
            for job in running:
                job.signal(signal.SIGKILL)
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--command", required=True, help="{name} stands for the job's name")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--each", type=float, default=30.0, help="seconds that a job may take")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of all together")
    args = parser.parse_args(argv)
    names = sys.stdin.read().split()
    status = run_all(
        names, args.command, args.out,
        at_once=args.at_once, each=args.each, seconds=args.seconds,
    )  # fmt: skip
    bad = {name: code for name, code in status.items() if code}
    print(f"{len(status) - len(bad)} of {len(names)} jobs ended well")
    for name, code in bad.items():
        print(f"{name}: " + ("stopped at the limit" if code == STOPPED else f"exit status {code}"))
        errors = (out_of(args.out, name)).strip().splitlines()
        if errors:
            print(f"  {errors[-1][:300]}")
    return 1 if bad or not names else 0


def out_of(folder: Path, name: str) -> str:
    path = folder / f"{name}.err"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main())
