"""The machine's own ceilings, which every benchmark is set against: what arithmetic and memory do
at best with torch's current number of threads.

On the CPU csrc/cpu/ceilings.cpp measures them: float FMA rate, rate of bf16 dot products or tiles
(AMX) where the CPU has the instruction, read and copy bandwidth at any buffer size (so in any
cache). On a GPU a large bf16 matmul and a clone stand for them.

    python -m fasttransformer.benchmarks.ceilings
"""

from __future__ import annotations

import math
from functools import cache

import torch

from fasttransformer.backends import backends
from fasttransformer.benchmarks._shared import Case, cpu_name, dtype_name, randn
from fasttransformer.benchmarks.clock import time_in_turns

SIZES = {1 << 16: "64 KiB", 1 << 20: "1 MiB", 1 << 24: "16 MiB", 1 << 28: "256 MiB"}
SECONDS = 0.1  # per measurement: long enough to see the best of some hundred samples
TRIES = 20


def available(device: str = "cpu") -> bool:
    """Whether ceilings can be measured: on the CPU they need the C++ library."""
    return device != "cpu" or backends()["cpu"] is None


_best: dict[tuple[object, ...], list[float]] = {}


def _ceiling(name: str, *sizes: int) -> float:
    """The best of all measurements so far, of which the first :data:`TRIES` calls make one each.

    Neighbours on the machine only ever lower a measurement, and they come and go.
    """
    measured = _best.setdefault((name, *sizes, *_here()), [])
    if len(measured) < TRIES:
        measured.append(getattr(torch.ops.fasttransformer, f"measure_{name}")(*sizes, SECONDS))
    return max(measured)


def _here() -> tuple[str, int]:
    return torch.ops.fasttransformer.cpu_isa(), torch.get_num_threads()


def fma_gflops() -> float:
    """Float multiply-adds, in GFLOP/s, with the instruction set in use."""
    return _ceiling("fma")


def dot_gflops() -> float:
    """bf16 products summed in float, in GFLOP/s: dot products, or tiles where AMX is in use.

    0 where the instruction set has neither.
    """
    return _ceiling("dot")


def dot_name() -> str:
    """What :func:`dot_gflops` is the rate of."""
    return "bf16 tiles (AMX)" if torch.ops.fasttransformer.cpu_isa() == "amx" else "bf16 dot"


@cache
def call_microseconds() -> float:
    """An operator on one element, by its registered name: what every call costs at least."""
    x, operator = torch.ones(1, 1), torch.ops.fasttransformer.softmax.default
    call = time_in_turns({"call": lambda: operator(x, 1.0, None, False, False)}, SECONDS)["call"]
    return call.low * 1e6


def _power(bytes: int) -> int:
    return 1 << max(14, math.ceil(math.log2(max(bytes, 1))))


def read_gbs(bytes: int) -> float:
    """Reading a buffer of about ``bytes`` (up to the next power of two), in GB/s."""
    return _ceiling("read", _power(bytes))


def copy_gbs(bytes: int) -> float:
    """Copying where source and destination are about ``bytes`` together, in GB/s read + written."""
    return _ceiling("copy", _power(bytes))


@cache
def matmul_gflops(dtype: torch.dtype, device: str) -> float:
    """torch's product of large square matrices on a GPU, in GFLOP/s."""
    n = 8192
    a = randn(n, n, dtype=dtype, device=device)
    took = time_in_turns({"matmul": lambda: a @ a}, SECONDS, device=device)["matmul"].low
    return 2 * n**3 / took / 1e9


@cache
def _clone(device: str, bytes: int) -> float:
    a = torch.empty(bytes // 2, dtype=torch.uint8, device=device)
    took = time_in_turns({"clone": a.clone}, SECONDS, device=device)["clone"].low
    return bytes / took / 1e9


def ceiling_of(case: Case) -> tuple[float, str] | None:
    """(ceiling in the case's unit, its name), or None where it can't be measured.

    A case bound by memory is set against copying as many bytes; one bound by arithmetic against
    FMA, and in bf16 against the faster of FMA and bf16 dot products or tiles.
    """
    if not available(case.device):
        return None
    if case.device != "cpu":
        if case.memory_bound:
            return _clone(case.device, _power(case.bytes)), "clone"
        return matmul_gflops(case.dtype, case.device), f"matmul {dtype_name(case.dtype)}"
    if case.memory_bound:
        return copy_gbs(case.bytes), "copy"
    fma, dot = fma_gflops(), dot_gflops()
    if case.dtype == torch.bfloat16 and dot > fma:
        return dot, dot_name()
    return fma, "FMA"


def table() -> list[tuple[str, str]]:
    """Every CPU ceiling as (name, value with unit)."""
    rows = [("float32 FMA", f"{fma_gflops():.0f} GFLOP/s")]
    dot = dot_gflops()
    rows.append((dot_name(), f"{dot:.0f} GFLOP/s" if dot else "none: widened to float32"))
    for kind, measure in (("read", read_gbs), ("copy", copy_gbs)):
        for bytes, label in SIZES.items():
            rows.append((f"{kind}, {label}", f"{measure(bytes):.0f} GB/s"))
    return rows


if __name__ == "__main__":
    if not available():
        raise SystemExit(f"ceilings need the C++ library: {backends()['cpu']}")
    isa, threads = _here()
    print(f"{cpu_name()}, {isa}, threads: {threads}")
    for name, value in table():
        print(f"  {name:18} {value}")
