"""Peak memory of a forward and backward pass as sequences grow.

    python -m fasttransformer.benchmarks.memory [--quick]

Prints a JSON line per (operation, candidate, length). On a GPU torch's allocator counts. On the CPU
the operating system does: the peak of resident memory, reset before each pass (Linux), less what
was resident before the candidate's first pass and less its inputs. That holds a kernel's own
scratch memory too, which no hook in torch's allocator sees. Each candidate runs in a process of its
own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer.benchmarks._shared import OURS
from fasttransformer.benchmarks.record import Memory

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK = LENGTHS[:3]
HEADS, HEAD_DIM = 8, 64
FEATURES, VOCABULARY = 512, 32000
#: The most that a candidate may need by its own growth: longer ones are left out.
MOST = 3 << 30


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(scores.masked_fill(later, -float("inf")), -1) @ v


def _attention(length: int, device: str) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, HEAD_DIM, device=device) for _ in range(3)]


def _logits(length: int, device: str) -> list[Tensor]:
    return [
        torch.randn(length, FEATURES, device=device),
        torch.randn(VOCABULARY, FEATURES, device=device) / 32,
    ]


def _labels(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % VOCABULARY


#: operation → (what its length counts, inputs, candidates).
OPERATIONS: dict[str, tuple[str, Callable[..., list[Tensor]], dict[str, Callable[..., Any]]]] = {
    "attention": (
        "tokens",
        _attention,
        {
            OURS: lambda q, k, v: ft.attention(q, k, v, is_causal=True),
            "torch sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "torch eager": _eager,
        },
    ),
    "linear_cross_entropy": (
        "tokens",
        _logits,
        {
            OURS: lambda x, w: ft.linear_cross_entropy(x, w, _labels(x)),
            "torch": lambda x, w: F.cross_entropy(F.linear(x, w), _labels(x)),
        },
    ),
}


def status(field: str) -> int:
    """Bytes of a field of this process's status (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field}")


def resident(device: str) -> int:
    """Bytes in use, once what was freed has gone back."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


#: Resident memory from which on freed memory is handed back between cases: freed blocks that later
#: cases don't fit into would fill the machine otherwise (a whole grid once took 24 GB).
KEPT_BYTES = 3 << 30


def hand_back() -> None:
    """Hands freed memory back to the system where the process holds much (Linux with glibc)."""
    try:
        if status("VmRSS") > KEPT_BYTES:
            resident("cpu")
    except (OSError, AttributeError):
        pass


def reset_peak() -> None:
    """From here on ``status("VmHWM")`` is the most that was resident (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_of(pass_: Callable[[], object], device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        pass_()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    reset_peak()
    pass_()
    return status("VmHWM")


def measure(op: str, name: str, device: str, quick: bool) -> Iterator[Memory]:
    """One candidate, from short to long."""
    _, inputs, candidates = OPERATIONS[op]
    function = candidates[name]

    def peak(length: int) -> int:
        tensors = [t.requires_grad_() for t in inputs(length, device)]
        made = sum(t.numel() * t.element_size() for t in tensors)

        def both() -> None:
            torch.autograd.grad(function(*tensors).sum(), tensors)

        return _peak_of(both, device) - made

    peak(64)  # what is loaded at first use
    before, last = resident(device), 0
    for length in QUICK if quick else LENGTHS:
        if 4 * last > MOST:  # four times as much, where it grows with the square
            return
        last = max(peak(length) - before, 0)
        yield Memory(op, name, length, last)


def _lines(command: list[str]) -> list[Memory]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [Memory(**json.loads(line)) for line in done.stdout.splitlines()]


def measured(quick: bool, device: str = "cpu") -> list[Memory]:
    """:func:`measure` in a process of its own; nothing where the system can't tell."""
    command = [sys.executable, "-m", __spec__.name, "--device", device]
    return _lines(command + ["--quick"] * quick)


def _fork(op: str, name: str, device: str, quick: bool) -> None:
    """A candidate in a fork, which is fresh: this process has computed nothing and has no threads
    yet."""
    child = os.fork()
    if child == 0:
        for found in measure(op, name, device, quick):
            print(json.dumps(asdict(found)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def _spawn(op: str, name: str, device: str, quick: bool) -> subprocess.Popen[bytes]:
    """A candidate in a new interpreter. A fork can't use a GPU: importing the package asks CUDA
    whether there is one, and CUDA that was started once can't be used in a child."""
    command = [sys.executable, "-m", __spec__.name, "--device", device, "--candidate", op, name]
    return subprocess.Popen(command + ["--quick"] * quick)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 2048 tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--candidate", nargs=2, metavar=("OP", "NAME"), help="this one, here")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        print("memory: peak memory can be read on Linux only", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if args.candidate:
        for found in measure(*args.candidate, args.device, args.quick):
            print(json.dumps(asdict(found)), flush=True)
        return 0
    pairs = [(op, name) for op, (_, _, candidates) in OPERATIONS.items() for name in candidates]
    if args.device == "cpu":
        for op, name in pairs:
            _fork(op, name, args.device, args.quick)
        return 0
    # All at once: each process's allocator counts its own memory, and a line is one write.
    children = [_spawn(op, name, args.device, args.quick) for op, name in pairs]
    return max(child.wait() for child in children)


if __name__ == "__main__":
    raise SystemExit(main())
