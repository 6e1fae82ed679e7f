"""What every benchmark shares: the shape of a case, its inputs, and how a rate is made of a time.

A bench file is a list of cases and one line for pytest:

    from fasttransformer.benchmarks._shared import OURS, Case, run_under_pytest

    def cases(quick: bool = False) -> list[Case]:
        def make():                                  # called when the case is run, not before
            x = randn(4096, 768)
            return {OURS: lambda: ft.softmax(x), "torch": lambda: torch.softmax(x, -1)}
        return [Case("softmax", "4096×768", torch.float32, make, bytes=2 * 4096 * 768 * 4)]

    test_softmax = run_under_pytest

"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "fasttransformer"
#: The name in a case's candidates of what is right: computed in float64, never timed.
REFERENCE = "reference"
#: flops of an operation bound by memory, an element: an exponential, a square root and an error
#: function count as one, like an addition.
SOFTMAX_FLOPS, NORM_FLOPS, ACTIVATION_FLOPS = 5, 8, 8
#: flops per byte from which on a case counts as bound by arithmetic. A core does 5 to 10 flops in
#: the time of a byte from memory.
BALANCE = 10

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: an operation at one shape and dtype, ours and its peers.

    ``bytes`` is what must be read and written at least once (each operand once), ``flops`` what
    must be computed (causal attention counts the allowed half only). Give both where both are
    known: their ratio places the case under the machine's roofline, and decides in which of the two
    the rate is given. ``make`` builds the inputs and returns name → callable, with :data:`OURS`
    first. It may add :data:`REFERENCE`, which returns in float64 what the others should, to check
    them by; without it they are held to ours. Cases that are not ``compared``
    have results that differ by right: dropout's, or padded ones.
    ``cold`` ones start each call with their inputs in memory, not in a cache. Cases whose ``along``
    names the same curve are drawn as one, over the number beside it.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[], Mapping[str, Candidate]]
    bytes: int = 0
    flops: int = 0
    device: str = "cpu"
    cold: bool = False
    compared: bool = True
    along: tuple[str, float] | None = None

    @property
    def id(self) -> str:
        return f"{self.op} {self.name} {dtype_name(self.dtype)}" + (" cold" if self.cold else "")

    @property
    def memory_bound(self) -> bool:
        return self.flops < BALANCE * self.bytes

    def rate(self, seconds: float) -> float:
        """GB/s of a case bound by memory, GFLOP/s of one bound by arithmetic."""
        return (self.bytes if self.memory_bound else self.flops) / seconds / 1e9

    @property
    def unit(self) -> str:
        return "GB/s" if self.memory_bound else "GFLOP/s"


def percent(share: float) -> str:
    """A fraction as the reports write it.

    >>> percent(0.456)
    '46 %'
    """
    return f"{100 * share:.0f} %"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- inputs -------------------------------------------------------------------------------------


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """Normal numbers from a fixed seed, so that two runs of a benchmark see the same inputs.

    They are drawn on the device itself: a GPU draws a gigabyte in a millisecond, and drawing it on
    the CPU and copying takes seconds.
    """
    kind = torch.device(device).type
    if kind == "meta":  # holds no numbers, so it has no generator
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad)
    generator = torch.Generator(device).manual_seed(hash(shape) & 0xFFFF)
    if kind == "cpu":  # drawn in float32 for every dtype, as committed results were
        x = torch.randn(shape, generator=generator).to(dtype)
    else:
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return x.requires_grad_(requires_grad)


def backward_of(function: Callable[..., Any], *inputs: Tensor) -> Candidate:
    """A candidate that runs only the backward pass of ``function(*inputs)``.

    The forward pass runs once here; gradients are taken of the inputs that require them.
    """
    out = function(*inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    grads = [randn(*o.shape, dtype=o.dtype, device=str(o.device)) for o in outs]
    wanted = [x for x in inputs if x.requires_grad]

    def backward() -> object:
        # A floor like a product without its bias leaves inputs unused.
        return torch.autograd.grad(outs, wanted, grads, retain_graph=True, allow_unused=True)

    return backward


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


#: What a candidate of :func:`candidates` does.
MODES: dict[str, Callable[..., Candidate]] = {
    "forward": lambda function, *inputs: lambda: function(*inputs),
    "backward": backward_of,
    "forward + backward": forward_backward_of,
}


def candidates(
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    mode: str = "forward",
    reference: Callable[..., Any] | None = None,
) -> dict[str, Candidate]:
    """name → candidate of the functions, ours first, all of the same inputs.

    ``reference`` is computed of the inputs in float64, when it is asked for.
    """
    made = {name: MODES[mode](function, *inputs) for name, function in functions.items()}
    if reference is not None:

        def wanted() -> object:
            wide = [
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                for x in inputs
            ]
            return MODES[mode](reference, *wide)()

        made[REFERENCE] = wanted
    return made


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


def affinity() -> int | None:
    """How many processors this process may run on, where the system says it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


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
        "affinity": affinity(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
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
