"""``fasttransformer check`` of one operation on one backend, a JSON line per result as it comes.

    python -m fasttransformer.benchmarks.gpu_check OP[.CASE] BACKEND [--from N]
    python -m fasttransformer.benchmarks.gpu_check --list

``--list`` names the jobs: an operation each, and of operations that Triton compiles for long, a
case each.

The command itself prints one JSON document when all is done; where a GPU is there for minutes only,
a kernel that hangs must not take the results before it along. A line {"started": case} says which
case runs, so that the last line of a job that was stopped names the one that hung. An illegal
access breaks the process's CUDA context for good: the remaining cases then run in a new process
(the same one, replaced), and the case that did it keeps its finding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict

import torch

from fasttransformer.backends import backends
from fasttransformer.cli.cases import CHECKS
from fasttransformer.cli.check import check

#: What compiles longest where Triton compiles comes first. Each case of attention is a job.
SLOW = ("attention", "linear_cross_entropy", "attention_varlen", "attention_decode", "feed_forward")
SPLIT = ("attention",)


def jobs() -> list[str]:
    names = list(dict.fromkeys(case.op for case in CHECKS))
    found = []
    for op in sorted(names, key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW)):
        count = sum(case.op == op for case in CHECKS)
        found += [f"{op}.{index}" for index in range(count)] if op in SPLIT else [op]
    return found


def context_is_broken() -> bool:
    """Whether an earlier kernel has broken this process's CUDA context."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def say(line: dict[str, object]) -> None:
    print(json.dumps(line, ensure_ascii=False), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", nargs="?")
    parser.add_argument("backend", nargs="?", default="cuda")
    parser.add_argument("--from", dest="first", type=int, default=0, help="skip cases before it")
    parser.add_argument("--list", action="store_true", help="name the operations")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(jobs()))
        return 0
    op, _, index = (args.op or "").partition(".")
    cases = [case for case in CHECKS if case.op == op]
    if index:
        cases = cases[int(index) :][:1]
    if not cases:
        parser.error(f"{args.op!r} is not one of {', '.join(jobs())}")
    reason = backends().get(args.backend)
    if reason is not None:  # every case would be skipped, which is no result
        say({"unavailable": reason})
        return 3
    findings = 0
    for number, case in enumerate(cases[args.first :], args.first):
        say({"started": case.name})
        began = time.monotonic()
        for _, results in check([case], [args.backend]):
            for result in results:
                findings += result.status == "finding"
                say(asdict(result) | {"seconds": round(time.monotonic() - began, 2)})
        if context_is_broken():
            say({"broken": case.name})
            if number + 1 < len(cases):
                os.execv(sys.executable, [sys.executable, "-m", __spec__.name, args.op,
                                          args.backend, "--from", str(number + 1)])  # fmt: skip
            return 1
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
