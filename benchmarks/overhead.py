"""What a call costs in addition to the kernel: operations on inputs so small that little
else is left.

    python -m fasttransformer.benchmarks.overhead [OP ...] [--json FILE]

For each operation, in microseconds: the bare operator, called with the arguments that the public
function would hand it; the public function without a gradient and with one, and how much each adds
to the operator; the backward pass, and what it adds to the backward operators; torch's own way to
the same numbers beside each. The target is 3 µs without and 8 µs with a gradient
(docs/benchmarks.md).

A time is the best of many short loops: a neighbour on the machine can only add to it. It runs on
one thread: torch's layer_norm and linear hand even such inputs to the thread pool, and on a busy
machine wait milliseconds for it. Rows come in a batch, (2, 2, 64), as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasttransformer as ft
from fasttransformer.benchmarks._shared import (
    Candidate,
    backward_of,
    cpu_name,
    environment,
    randn,
)

TURNS, CALLS = 300, 50
ROWS, FEATURES = 4, 64

X = RESIDUAL = (2, ROWS // 2, FEATURES)
MATRIX, VECTOR = (FEATURES, FEATURES), (FEATURES,)
HEADS = (1, 2, ROWS, 16)

#: operation → (shapes of its tensors, ours, torch's).
CALLS_OF: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Any], Callable[..., Any]]] = {
    "softmax": ((X,), ft.softmax, lambda x: torch.softmax(x, -1)),
    "layer_norm": (
        (X, VECTOR, VECTOR),
        lambda x, w, b: ft.layer_norm(x, (FEATURES,), w, b),
        lambda x, w, b: F.layer_norm(x, (FEATURES,), w, b),
    ),
    "rms_norm": (
        (X, VECTOR),
        lambda x, w: ft.rms_norm(x, (FEATURES,), w),
        lambda x, w: F.rms_norm(x, (FEATURES,), w),
    ),
    "add_layer_norm": (
        (X, RESIDUAL, VECTOR, VECTOR),
        lambda x, r, w, b: ft.add_layer_norm(x, r, (FEATURES,), w, b)[0],
        lambda x, r, w, b: F.layer_norm(x + r, (FEATURES,), w, b),
    ),
    "add_rms_norm": (
        (X, RESIDUAL, VECTOR),
        lambda x, r, w: ft.add_rms_norm(x, r, (FEATURES,), w)[0],
        lambda x, r, w: F.rms_norm(x + r, (FEATURES,), w),
    ),
    "linear_add": (
        (X, MATRIX, VECTOR, RESIDUAL),
        ft.linear_add,
        lambda x, m, b, r: F.linear(x, m, b) + r,
    ),
    "linear_add_layer_norm": (
        (X, MATRIX, VECTOR, RESIDUAL, VECTOR, VECTOR),
        lambda *tensors: ft.linear_add_layer_norm(*tensors)[0],
        lambda x, m, b, r, w, c: F.layer_norm(F.linear(x, m, b) + r, (FEATURES,), w, c),
    ),
    "linear_add_rms_norm": (
        (X, MATRIX, VECTOR, RESIDUAL, VECTOR),
        lambda *tensors: ft.linear_add_rms_norm(*tensors)[0],
        lambda x, m, b, r, w: F.rms_norm(F.linear(x, m, b) + r, (FEATURES,), w),
    ),
    "attention": ((HEADS,) * 3, ft.attention, F.scaled_dot_product_attention),
}


class _Operators(TorchDispatchMode):
    """Notes the calls of our own operators, to repeat them without the front."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Candidate] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fasttransformer"):
            self.calls.append(lambda: func(*args))
        return func(*args, **(kwargs or {}))


def _operators(call: Candidate) -> Candidate:
    with _Operators() as seen:
        call()
    if not seen.calls:
        return lambda: None  # the torch backend: no operator of ours runs
    if len(seen.calls) == 1:
        return seen.calls[0]
    return lambda: [operator() for operator in seen.calls]


def best_times(candidates: dict[str, Candidate]) -> dict[str, float]:
    """The shortest time of a call of each, in microseconds; the candidates take turns."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(TURNS):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
    return {name: seconds * 1e6 for name, seconds in best.items()}


def measure(op: str) -> dict[str, float]:
    """Microseconds of a call of ``op``, its operators and torch's twin, on float32."""
    shapes, ours, torchs = CALLS_OF[op]

    def tensors(grad: bool) -> list[Tensor]:
        return [randn(*shape, requires_grad=grad) for shape in shapes]

    plain, leaves = tensors(False), tensors(True)
    backward = backward_of(ours, *leaves)
    return best_times(
        {
            "operator": _operators(lambda: ours(*plain)),
            "front": lambda: ours(*plain),
            "torch": lambda: torchs(*plain),
            "front, grad": lambda: ours(*leaves),
            "torch, grad": lambda: torchs(*leaves),
            "backward operator": _operators(backward),
            "backward": backward,
            "torch, backward": backward_of(torchs, *leaves),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="what a call costs in addition to its kernel")
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(CALLS_OF))
    parser.add_argument("--json", metavar="FILE", help="write the times there, in µs")
    given = parser.parse_args()
    unknown = [op for op in given.ops if op not in CALLS_OF]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(CALLS_OF)}")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}; µs a call")
    head = (
        "operator", "front", "adds", "torch", "| grad", "adds", "torch",
        "| bw op", "backward", "adds", "torch",
    )  # fmt: skip
    print(f"{'':21}", *(f"{name:>8}" for name in head))
    for op in given.ops or CALLS_OF:
        t = results[op] = measure(op)
        row = (
            t["operator"], t["front"], t["front"] - t["operator"], t["torch"],
            t["front, grad"], t["front, grad"] - t["operator"], t["torch, grad"],
            t["backward operator"], t["backward"], t["backward"] - t["backward operator"],
            t["torch, backward"],
        )  # fmt: skip
        print(f"{op:21}", *(f"{value:8.2f}" for value in row), flush=True)
    if given.json:
        rounded = {op: {k: round(v, 2) for k, v in t.items()} for op, t in results.items()}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment(), "microseconds": rounded}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
