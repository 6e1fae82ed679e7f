"""What every benchmark shares: the shape of a case, the clock, and how a rate is made of a time.

A bench file is a list of cases and one line for pytest:

    from fasttransformer.benchmarks._shared import OURS, Case, run_under_pytest

    def cases(quick: bool = False) -> list[Case]:
        def make():                                  # called when the case is run, not before
            x = randn(4096, 768)
            return {OURS: lambda: ft.softmax(x), "torch": lambda: torch.softmax(x, -1)}
        return [Case("softmax", "4096×768", torch.float32, make, bytes=2 * 4096 * 768 * 4)]

    test_softmax = run_under_pytest

Candidates are timed in turns (A B A B …), so that a machine whose clock or neighbours change slows
all of them alike; a result is the median of the turns, with the quartiles as its spread.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "fasttransformer"

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: an operation at one shape and dtype, ours and its peers.

    ``bytes`` is what must be read and written at least once (each operand once), for operations
    bound by memory; ``flops`` is what must be computed, for the others (causal attention counts
    the allowed half only). Give one of the two. ``make`` builds the inputs and returns
    name → callable, with :data:`OURS` first.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[], Mapping[str, Candidate]]
    bytes: int = 0
    flops: int = 0
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"{self.op} {self.name} {dtype_name(self.dtype)}"

    def rate(self, seconds: float) -> float:
        """GB/s of a case bound by memory, GFLOP/s of one bound by arithmetic."""
        return (self.bytes or self.flops) / seconds / 1e9

    @property
    def unit(self) -> str:
        return "GB/s" if self.bytes else "GFLOP/s"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the turns and their quartiles."""

    median: float
    low: float
    high: float
    turns: int

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- inputs -------------------------------------------------------------------------------------


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """Normal numbers from a fixed seed, so that two runs of a benchmark see the same inputs."""
    generator = torch.Generator().manual_seed(hash(shape) & 0xFFFF)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    return x.requires_grad_(requires_grad)


def backward_of(function: Callable[..., Any], *inputs: Tensor) -> Candidate:
    """A candidate that runs only the backward pass of ``function(*inputs)``.

    The forward pass runs once here; gradients are taken of the inputs that require them.
    """
    out = function(*inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    grads = [randn(*o.shape, dtype=o.dtype, device=str(o.device)) for o in outs]
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True)


def forward_backward_of(function: Callable[..., Any], *inputs: Tensor) -> Candidate:
    """A candidate that runs ``function(*inputs)`` and the gradients of the inputs that want one."""
    wanted = [x for x in inputs if x.requires_grad]
    first = function(*inputs)
    outs = first if isinstance(first, tuple) else (first,)
    grads = [randn(*o.shape, dtype=o.dtype, device=str(o.device)) for o in outs]

    def step() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), wanted, grads)

    return step


def keep_allocations() -> bool:
    """Has glibc keep freed memory, so that outputs land on pages that are there already.

    A fresh large block costs a page fault per 4 KiB, 5 to 8 GB/s: more than any of the kernels
    that write into it. Benchmarks of single operations call this once, for every candidate alike,
    so that they compare kernels. Returns whether this C library could be told.
    """
    try:
        libc = ctypes.CDLL(None)
        # M_MMAP_MAX = 0: no block of its own for a large allocation; M_TRIM_THRESHOLD = −1: never
        # hand the top of the heap back.
        return bool(libc.mallopt(-4, 0)) and bool(libc.mallopt(-1, -1))
    except (OSError, AttributeError):
        return False


# ---- clock --------------------------------------------------------------------------------------


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _sample(function: Candidate, calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def time_in_turns(
    candidates: Mapping[str, Candidate],
    budget: float = 1.0,
    *,
    device: str = "cpu",
    turns: int = 5,
    sample: float = 2e-3,
) -> dict[str, Timing]:
    """Times the candidates in turns for about ``budget`` seconds in all.

    Each is run twice first (the first run pays for packing, page faults and caches). A turn calls
    a short candidate as often as fills ``sample`` seconds. There are at least ``turns`` turns,
    unless that would take more than four budgets: then as many as fit, at least one.
    """
    calls: dict[str, int] = {}
    once = 0.0
    for name, function in candidates.items():
        warm = _sample(function, 1, device)
        if warm < budget:
            warm = _sample(function, 1, device)
        calls[name] = max(1, min(10_000, int(sample / max(warm, 1e-7))))
        once += warm * calls[name]
    rounds = max(turns, int(budget / once))
    if rounds * once > 4 * budget:
        rounds = max(1, int(4 * budget / once))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            times[name].append(_sample(candidates[name], calls[name], device))
        order.append(order.pop(0))  # nobody always runs right after the same neighbour
    return {name: timing_of(seconds) for name, seconds in times.items()}


def timing_of(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of a list of times.

    >>> timing_of([3.0, 1.0, 2.0]).median
    2.0
    """
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, len(seconds))


# ---- surroundings -------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: kept in every JSON file beside the numbers."""
    from fasttransformer import __version__
    from fasttransformer.backends import backends

    here: dict[str, Any] = {
        "fasttransformer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if backends()["cpu"] is None:
        here["cpu_isa"] = torch.ops.fasttransformer.cpu_isa()
    if torch.cuda.is_available():
        here["gpu"] = torch.cuda.get_device_name()
        here["cuda"] = torch.version.cuda
    return here


# ---- pytest-benchmark ---------------------------------------------------------------------------


def run_under_pytest(benchmark: Any, case: Case, candidate: str) -> None:
    """The test function of every bench file; benchmarks/conftest.py fills in case and candidate."""
    candidates = case.make()
    if candidate not in candidates:
        sys.modules["pytest"].skip(f"{candidate} does not do this case")
    benchmark.group = case.id
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    benchmark(candidates[candidate])
