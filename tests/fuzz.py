"""Random calls of every operation, against the reference in float64: ``make fuzz``.

A draw takes a case of ``operation_cases.py`` and gives it random sizes (0 and 1, those next to what
vectors and tiles hold, and others), a dtype, an instruction set, options, the size of its numbers,
and a layout in poisoned memory for each argument. Outputs and gradients may be ten times as far
from float64 as the reference in the same dtype, and some rounding steps; NaN, infinities, dtypes
and shapes must be the reference's; what lies around the arguments must stay what it was. (The
contract itself is held in the mean over draws, by the tests of each operation.)

A draw is made from its number alone, so that a number is a reproducer: ``tests/fuzz.py --draw N``.
The draws run in a child process; one that ends it is reported with its number, and the rest go on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from operation_cases import CASES, Case, evaluated
from test_layouts import LAYOUTS, Run, layouts_of
from torch import Tensor

import fasttransformer as ft
from contract import RUNNABLE, running_on
from fasttransformer._contract import rounding_step

CPU = [on for on in RUNNABLE if on.startswith("cpu:")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200)
#: Numbers that a draw may hold in all (a large one takes 0.1 s, in float64 and three times).
LARGEST = 1 << 18

#: Options that any case of an operation may have, each drawn or left out.
OPTIONS: dict[str, dict[str, Callable[[random.Random], Any]]] = {
    "softmax": {"scale": lambda r: r.choice((0.0, -1.5, 0.3, 20.0))},
    "log_softmax": {"scale": lambda r: r.choice((0.1, 3.0))},
    "attention": {
        "is_causal": lambda r: True,
        "causal_alignment": lambda r: r.choice(("top_left", "bottom_right")),
        "window": lambda r: (r.choice((None, 0, 3, 40)), r.choice((None, 0, 5))),
        "softcap": lambda r: r.choice((0.5, 30.0)),
        "scale": lambda r: r.choice((0.05, 1.0)),
        "return_lse": lambda r: True,
    },
    "cross_entropy": {
        "reduction": lambda r: r.choice(("mean", "sum", "none")),
        "label_smoothing": lambda r: 0.2,
    },
    **{
        op: {"eps": lambda r: r.choice((1e-12, 1e-5, 0.1))}
        for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    },
    "linear_add": {"activation": lambda r: r.choice(("relu", "gelu", "gelu_tanh", "silu"))},
    "linear_softmax": {"temperature": lambda r: r.choice((0.2, 3.0))},
}
OPTIONS["attention_varlen"] = OPTIONS["attention"]
OPTIONS["linear_cross_entropy"] = OPTIONS["cross_entropy"]


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call, made from a number."""

    number: int
    case: Case
    on: str
    n: Mapping[str, int]
    dtype: torch.dtype
    size: float
    options: Mapping[str, Any]
    layouts: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"--draw {self.number}: {self.case.id} on {self.on}, {str(self.dtype)[6:]}, "
            f"{dict(self.n)}, numbers of size {self.size:g}, {dict(self.options)}, "
            f"{dict(self.layouts)}"
        )


def sizes(r: random.Random, case: Case) -> dict[str, int]:
    """Few of the sizes are changed in some draws and all in others, within LARGEST numbers."""
    for _ in range(20):
        n, often = dict(case.n), r.random()
        for name in case.can_be_one():
            if r.random() < often:
                n[name] = r.choice(SIZES)
        if "G" in n and "H" in n and case.op != "rotary_embedding":  # key heads divide the query's
            n["H"] = n["G"] * r.choice((1, 1, 2, 3))
        if case.op == "attention_decode":
            n["S"] = r.randint(1, 3)
        counts = [max(1, math.prod(a.sizes(n))) for a in case.arguments.values()]
        if any(a.kind == "ids" and not evaluated(a.below, n) for a in case.arguments.values()):
            continue  # ids of nothing
        if sum(counts) < LARGEST and _scores(n) < LARGEST:
            return n
    return dict(case.n)


def _scores(n: Mapping[str, int]) -> int:
    return n.get("B", 1) * n.get("H", 1) * max(n.get("S", 1), n.get("Q", 1)) * n.get("T", 1)


def drawn(number: int, ops: list[str]) -> Draw:
    r = random.Random(number)
    case = r.choice([case for case in CASES if not ops or case.op in ops])
    on = r.choice([on for on in (*CPU, "torch") if on in case.backends()])
    n = sizes(r, case)
    names = OPTIONS.get(case.op, {})
    options = {name: make(r) for name, make in names.items() if r.random() < 0.3}
    if "label_smoothing" in options and case.name == "probabilities" and r.random() < 0.5:
        del options["label_smoothing"]
    if "causal_alignment" in options and "is_causal" not in {**case.options(n), **options}:
        del options["causal_alignment"]
    dtype = r.choice(DTYPES)
    # What lies between the steps of an operation must be numbers in float16 too.
    size = 1.0 if dtype == torch.float16 else r.choice((1.0, 1.0, 1.0, 1e-3, 10.0))
    layouts = {}
    for path, argument in case.arguments.items():
        x = argument.make(n, torch.Generator().manual_seed(0))
        able = list(layouts_of(x, argument.kind, argument.written)) if x.numel() else []
        if able and r.random() < 0.4:
            layouts[path] = r.choice(able)
    return Draw(number, case, on, n, dtype, size, options, layouts)


def run(draw: Draw) -> list[str]:
    """What is wrong with a draw; nothing where its arguments are refused by all alike."""
    base = draw.case.tensors(draw.n, torch.float32)
    for path, x in base.items():
        if draw.case.arguments[path].kind == "float" and not path.startswith("lses"):
            x.mul_(draw.size)
        if "cross_entropy" in draw.case.op and path == "weight":
            x.abs_()  # a mean by weights whose sum is near 0 is ill-conditioned
    base = {p: draw.case._cast(p, x, draw.dtype) for p, x in base.items()}
    views = {p: LAYOUTS[draw.layouts[p]](x) if p in draw.layouts else x for p, x in base.items()}
    values = {p: x.clone(memory_format=torch.contiguous_format) for p, x in views.items()}
    around = {p: memory_of(x) for p, x in views.items() if not draw.case.arguments[p].written}
    before = {p: x.clone() for p, x in around.items()}
    case = dataclasses.replace(
        draw.case, options=lambda n: {**draw.case.options(n), **draw.options}
    )

    def called(on: str, tensors: Mapping[str, Tensor]) -> Run | Exception:
        try:
            return Run(case, on, draw.n, tensors)
        except (ValueError, TypeError, NotImplementedError) as error:
            return error

    with running_on(draw.on, launched=None):
        got = called(draw.on, views)
    with ft.use_backend("torch"):
        wide = {p: x.double() if x.is_floating_point() else x.clone() for p, x in values.items()}
        want, peer = (
            called(draw.on, wide),
            called(draw.on, {p: x.clone() for p, x in values.items()}),
        )
    if isinstance(got, Exception) or isinstance(want, Exception) or isinstance(peer, Exception):
        refused = {type(x).__name__ + str(x) for x in (got, peer) if isinstance(x, Exception)}
        both = isinstance(got, Exception) and isinstance(peer, Exception)
        return [] if both and len(refused) == 1 else [f"refused by one alone: {sorted(refused)}"]
    # Where terms cancel, what is left may be as far off as one of them was rounded.
    term = 8 * torch.finfo(draw.dtype).eps * draw.size ** (1 if draw.size >= 1 else 2)
    wrong = [w for name in want.found for w in differs(name, got, want, peer, term)]
    for path, memory in around.items():
        if not torch.equal(bits(memory), bits(before[path])):
            wrong.append(f"{path} or the memory around it was written to")
    return wrong


def differs(name: str, got: Run, want: Run, peer: Run, term: float) -> list[str]:
    expected, other = want.found[name], peer.found[name]
    x = got.found.get(name)
    if x is None or x.shape != expected.shape or x.dtype != other.dtype:
        return [f"{name}: {x if x is None else (tuple(x.shape), x.dtype)}, not "
                f"{(tuple(expected.shape), other.dtype)}"]  # fmt: skip
    if not x.is_floating_point():
        return [] if torch.equal(x, other) or name == "output 1" else [f"{name}: other integers"]
    sane = torch.finfo(x.dtype).max / 4
    expected, exact = expected.double(), other.isfinite() & (expected.abs() < sane)
    strange = x.double().isfinite() != expected.isfinite()
    if (strange & ((expected.abs() < sane) | ~expected.isfinite())).any():
        return [f"{name}: NaN or infinity in another place"]
    if not exact.any():
        return []
    error = (x.double() - expected)[exact].abs().max().item()
    own = (other.double() - expected)[exact].abs().max().item()
    step = rounding_step(x.dtype, expected[exact].abs().max().item())
    allowed = 10 * own + 2 * step + term
    return [] if error <= allowed else [f"{name}: off by {error:.3g}, allowed {allowed:.3g}"]


def memory_of(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.element_size(),))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def work(first: int, seconds: float, ops: list[str]) -> None:
    """In a child: draw after draw, each number before its call, what is wrong after it."""
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        draw = drawn(number, ops)
        print(f"draw {number} {draw.case.op}", flush=True)
        for wrong in run(draw):
            print(f"WRONG {draw}: {wrong}", flush=True)
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all operations")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None, help="the first draw's number")
    parser.add_argument("--draw", type=int, help="run this draw alone, in this process")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.draw is not None:
        draw = drawn(args.draw, args.ops)
        print(draw, flush=True)
        wrong = run(draw)
        print("\n".join(wrong) or "right")
        return bool(wrong)
    if args.work:
        work(int(args.work[0]), float(args.work[1]), args.ops)
        return 0
    number = args.seed if args.seed is not None else random.SystemRandom().randrange(10**9)
    counts: collections.Counter[str] = collections.Counter()
    end, findings = time.monotonic() + 60 * args.minutes, 0
    print(f"fuzz: {args.minutes:g} minutes from draw {number}")
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, str(Path(__file__)), *args.ops, "--work", str(number), str(left)]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        ) as child:
            op, started = "", number
            for line in child.stdout or ():
                if line.startswith("draw "):
                    _, said, op = line.split()
                    number = int(said) + 1
                    counts[op] += 1
                elif line.startswith("WRONG"):
                    findings += 1
                    print(line.rstrip(), flush=True)
        if child.returncode:
            findings += 1
            print(f"DIED ({child.returncode}) --draw {number - 1}: {op}", flush=True)
            if number == started:  # the child can't start, or dies before its first draw
                break
    print(", ".join(f"{op} {count}" for op, count in sorted(counts.items())))
    print(f"{sum(counts.values())} draws, {findings} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
