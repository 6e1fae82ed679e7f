"""``fasttransformer check``: every operation × backend of this machine against the reference in
float64, outputs and gradients, held to the number contract of ``_contract.py``.

The cases are the table in ``cases.py``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft

from .. import reference
from .._arguments import not_one_of
from .._contract import (
    DRAWS,
    ISAS,
    Comparison,
    compare_runs,
    device_of,
    fairly,
    outputs_and_gradients,
    runnable,
    running_on,
)
from .._interpreter import round_as_devices
from .._libraries import interpreted
from ..backends import NAMES, TABLE, backends
from ._output import UsageError, command, console, escape, print_json, progress, table
from .cases import CHECKS, Check

CHECKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Result:
    """One case on one backend in one dtype. ``status``: ok, skipped (``note``: why) or finding."""

    op: str
    case: str
    dtype: str
    backend: str
    status: str
    worst: float = 0.0  # the largest error over its allowance; beyond 1 it is a finding
    note: str = ""


def _inputs(case: Check, dtype: torch.dtype, draw: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3 + draw)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes()]


class _Yardstick:
    """The reference's outputs and gradients for one case and dtype, in float64 and in the dtype."""

    def __init__(self, case: Check, dtype: torch.dtype, draw: int = 0) -> None:
        self.inputs = _inputs(case, dtype, draw)

        def call(*inputs: Tensor) -> Any:
            return case.call(reference, *inputs)

        self.exact = outputs_and_gradients(call, self.inputs, dtype=torch.float64)
        self.peer = outputs_and_gradients(call, self.inputs)


def _check_on(
    backend: str, case: Check, dtype: torch.dtype, yardstick: _Yardstick, grads: bool = True
) -> Result:
    name = str(dtype).removeprefix("torch.")

    def call(*inputs: Tensor) -> Any:
        return case.call(ft, *inputs)

    def result(status: str, worst: float = 0.0, note: str = "") -> Result:
        return Result(case.op, case.name, name, backend, status, worst, note)

    def compared(held_to: _Yardstick) -> dict[str, Comparison]:
        with running_on(backend):
            got = outputs_and_gradients(
                call, held_to.inputs, device=device_of(backend), grads=grads
            )
        return compare_runs(got, held_to.exact, held_to.peer)

    others = (_Yardstick(case, dtype, draw) for draw in range(1, DRAWS + 1))
    try:
        found = fairly(compared(yardstick), lambda: compared(next(others)), DRAWS)
    except Exception as error:  # whatever goes wrong in an operation is what this command is for
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        _, refused, why = text.partition("was asked for but can't do this: ")
        if not refused:
            return result("finding", note=text)
        if grads and ("grad" in why or "backward" in why):  # what it has is looked at all the same
            outputs_only = _check_on(backend, case, dtype, yardstick, grads=False)
            return replace(outputs_only, note=outputs_only.note or f"outputs only: {why}")
        return result("skipped", note=why)
    worst = max((f.error / f.allowed for f in found.values() if f.allowed), default=0.0)
    problem = next((f"{at}: {f.problem}" for at, f in found.items() if f.problem), "")
    return result("finding" if problem else "ok", worst, problem)


def check(cases: list[Check], on: list[str]) -> Iterator[tuple[Check, list[Result]]]:
    """Runs each case on each backend that has a kernel for it; yields a case's results at once."""
    for case in cases:
        results: list[Result] = []
        able = [name for name in on if name.split(":")[0] in TABLE[case.op]]
        for dtype in CHECKED_DTYPES if able else ():
            yardstick = _Yardstick(case, dtype)
            results += [_check_on(name, case, dtype, yardstick) for name in able]
        yield case, results


def _show(
    ops: list[str], results: list[Result], on: list[str], missing: dict[str, str], seconds: float
) -> None:
    out = console()
    by_cell: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        by_cell[result.op, result.backend].append(result)
    body = table("operation", *on)
    for op in ops:
        body.add_row(op, *[_cell(by_cell.get((op, name))) for name in on])
    out.print(body)
    out.print(
        "\n[dim]✓ number of cases × dtypes (largest error as a fraction of what is allowed: twice "
        "plain PyTorch's own error in that dtype, and one rounding step); – no kernel, or it lacks "
        "every case[/]"
    )
    findings = [result for result in results if result.status == "finding"]
    for result in findings:
        out.print(
            f"[red]finding[/] {result.op} ({escape(result.case)}) {result.dtype} on "
            f"{result.backend}: {escape(result.note)}"
        )
    reasons = {
        (result.op, result.backend.split(":")[0], result.note)
        for result in results
        if result.status != "finding" and result.note
    }
    for op, backend, why in sorted(reasons):
        out.print(f"[dim]{op} on {backend}: {escape(why)}[/]")
    for name, why in missing.items():
        out.print(f"[dim]not checked: {name}, {escape(why)}[/]")
    ran = sum(result.status != "skipped" for result in results)
    word = "[green]no finding[/]"
    if findings:
        word = f"[red]{len(findings)} finding{'s' if len(findings) > 1 else ''}[/]"
    out.print(f"{word} in {ran} checks, {seconds:.0f} s")


def _cell(results: list[Result] | None) -> str:
    ran = [result for result in results or () if result.status != "skipped"]
    if not ran:
        return "–"
    bad = sum(result.status == "finding" for result in ran)
    if bad:
        return f"[red]✗ {bad} of {len(ran)}[/]"
    return f"[green]✓[/] {len(ran)} ({max(result.worst for result in ran):.2f})"


#: What can be checked on one machine or another.
_EVERYWHERE = (*NAMES, *(f"cpu:{isa}" for isa in ISAS))


def _missing(on: Iterable[str]) -> dict[str, str]:
    """What is not among ``on`` → why it can't run here; an instruction set where others can."""
    here = {*on, *(name.split(":")[0] for name in on)}
    reasons = backends()
    return {
        name: reasons[name.split(":")[0]] or "this CPU or this build lacks it"
        for name in _EVERYWHERE
        if name not in here and (":" not in name or reasons["cpu"] is None)
    }


def _chosen(args: argparse.Namespace) -> tuple[list[Check], list[str]]:
    ops = {case.op for case in CHECKS}
    for op in args.ops:
        if op not in ops:
            raise UsageError(not_one_of(op, sorted(ops)))
    on = runnable()
    if args.backend:
        on = [name for name in on if name.split(":")[0] == args.backend or name == args.backend]
        if not on:
            if args.backend not in _EVERYWHERE:
                raise UsageError(f"--backend: {not_one_of(args.backend, _EVERYWHERE)}")
            raise UsageError(f"--backend {args.backend}: {_missing(())[args.backend]}")
    return [case for case in CHECKS if not args.ops or case.op in args.ops], on


def run(args: argparse.Namespace) -> int:
    """1 on a finding."""
    cases, on = _chosen(args)
    if "triton" in on and interpreted():
        round_as_devices()
        # NumPy's words on infinities and NaN, which devices compute without any.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    start = time.monotonic()
    results: list[Result] = []
    with progress() as bar:
        task = bar.add_task("checking", total=len(cases))
        for case, found in check(cases, on):
            results += found
            bar.update(task, advance=1, description=f"{case.op}: {case.name}")
    seconds = time.monotonic() - start
    missing = {} if args.backend else _missing(on)
    findings = sum(result.status == "finding" for result in results)
    if args.json:
        print_json({"findings": findings, "seconds": seconds, "backends": on, "missing": missing,
                    "results": [asdict(result) for result in results]})  # fmt: skip
    else:
        _show(list(dict.fromkeys(case.op for case in cases)), results, on, missing, seconds)
    return 1 if findings else 0


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "check",
        "every operation on every backend of this machine against the float64 reference",
        "  fasttransformer check\n"
        "  fasttransformer check attention softmax --backend cpu\n"
        "  TRITON_INTERPRET=1 fasttransformer check --backend triton   # without a GPU\n"
        "  fasttransformer check --json > check.json; echo $?          # 1 on a finding\n",
    )  # fmt: skip
    parser.add_argument("ops", metavar="OP", nargs="*", help="default: every operation")
    which = "cpu, cpu:avx2 (one instruction set), cuda, triton or torch"
    parser.add_argument("--backend", metavar="NAME", help=which)
    parser.add_argument("--json", action="store_true", help="print every result as JSON")
    parser.set_defaults(run=run)
