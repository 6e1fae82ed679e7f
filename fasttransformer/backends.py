"""One table says which backend can run which operation; everything that chooses reads it.

``TABLE[op][backend]`` is a :class:`Kernel`: what the backend's kernel for this operation covers,
and the two operators (forward, backward) that run it. :func:`choose` looks at metadata only
(device, dtype, sizes, options in use), so under ``torch.compile`` the choice is made while tracing
and leaves no code behind. ``torch`` is the reference: it has no operators and always works.

To add a case to a kernel, widen its row; to add a backend or an operation, add a row. A reason is
text that a user can act on: it is what :func:`explain` prints and what a forced backend raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NAMES = ("cuda", "triton", "cpu", "torch")
F32_AND_16_BIT = (torch.float32, torch.float16, torch.bfloat16)

#: The order in which backends are tried, by device type.
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),  # ROCm's device is called cuda too; it has no CUDA library
    "xpu": ("triton", "torch"),
}


@dataclass(frozen=True, eq=False)
class Kernel:
    """What one backend's kernel for one operation covers.

    ``limits`` holds the largest value of a named size (``head_dim``); ``lacks`` names the options
    of the operation that the kernel does not do yet (``window``); ``no_backward`` names those that
    it does forward only. ``backward_from`` names the operations whose backward operators its
    gradient is joined from, where it has none of its own.
    """

    backend: str
    dtypes: tuple[torch.dtype, ...] = F32_AND_16_BIT
    limits: Mapping[str, int] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    no_backward: frozenset[str] = frozenset()
    backward_from: tuple[str, ...] = ()
    forward: Any = None  # torch.ops overloads, bound when the backend's library has been loaded
    backward: Any = None

    def unsupported(
        self, dtype: torch.dtype, options: frozenset[str], sizes: tuple[tuple[str, int], ...]
    ) -> str | None:
        """Why this kernel can't do a case, or None."""
        if self.backend == "torch":
            return None
        if self.forward is None:
            return "the library that is installed does not implement it"
        if dtype not in self.dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"dtype {str(dtype).removeprefix('torch.')} (it has {allowed})"
        missing = sorted(options & self.lacks)
        if missing:
            return f"no {' or '.join(missing)} in this kernel yet"
        if "grad" in options:
            missing = sorted(options & self.no_backward)
            if missing:
                return f"no backward with {' or '.join(missing)} in this kernel yet"
            if self.backward is None and not self.backward_from:
                return "the library that is installed does not implement its backward"
            rows = ((op, TABLE[op].get(self.backend)) for op in self.backward_from)
            missing = [op for op, kernel in rows if kernel is None or kernel.backward is None]
            if missing:
                return f"its backward needs that of {' and '.join(missing)}, which is not there"
        for name, size in sizes:
            if size > self.limits.get(name, size):
                return f"{name} {size} (at most {self.limits[name]})"
        return None


def _lacks(*names: str) -> frozenset[str]:
    return frozenset(names)


#: Targets that are probabilities, and the gradient of the class weights.
_CROSS_ENTROPY_LACKS = _lacks("probabilities", "weight_grad")
#: The slopes' own gradient.
_ATTENTION_LACKS = _lacks("alibi_slopes_grad")
#: A cache of another dtype than the query's.
_DECODE_LACKS = _lacks("mixed_dtypes")

#: The backward operators that the two fused with a linear layer are joined from.
_LINEAR_LAYER_NORM = ("add_layer_norm", "linear_add")
_LINEAR_RMS_NORM = ("add_rms_norm", "linear_add")

_LINEAR_SOFTMAX = ("softmax", "linear_add")

#: What goes to the reference: targets as probabilities, and losses over more dimensions.
_LINEAR_LOSS_LACKS = _lacks("probabilities", "weight_grad", "more_dimensions")

#: operation → backend → kernel. Operations without a kernel of ours yet have the torch row only.
TABLE: dict[str, dict[str, Kernel]] = {
    "softmax": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "layer_norm": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "rms_norm": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "add_layer_norm": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "add_rms_norm": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "linear_add": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "linear_add_layer_norm": {
        "cuda": Kernel("cuda", backward_from=_LINEAR_LAYER_NORM),
        "triton": Kernel("triton", backward_from=_LINEAR_LAYER_NORM),
        "cpu": Kernel("cpu", backward_from=_LINEAR_LAYER_NORM),
    },
    "linear_add_rms_norm": {
        "cuda": Kernel("cuda", backward_from=_LINEAR_RMS_NORM),
        "triton": Kernel("triton", backward_from=_LINEAR_RMS_NORM),
        "cpu": Kernel("cpu", backward_from=_LINEAR_RMS_NORM),
    },
    "attention": {
        "cuda": Kernel("cuda", limits={"head_dim": 256}, lacks=_ATTENTION_LACKS),
        "triton": Kernel("triton", limits={"head_dim": 256}, lacks=_ATTENTION_LACKS),
        "cpu": Kernel("cpu", lacks=_ATTENTION_LACKS),
    },
    "attention_varlen": {
        "cuda": Kernel("cuda", limits={"head_dim": 256}, lacks=_ATTENTION_LACKS),
        "triton": Kernel("triton", limits={"head_dim": 256}, lacks=_ATTENTION_LACKS),
        "cpu": Kernel("cpu", lacks=_ATTENTION_LACKS),
    },
    "attention_decode": {
        "cuda": Kernel("cuda", limits={"head_dim": 256}, lacks=_DECODE_LACKS),
        "triton": Kernel("triton", limits={"head_dim": 256}, lacks=_DECODE_LACKS),
        "cpu": Kernel("cpu", lacks=_DECODE_LACKS),
    },
    "merge_attention": {"cuda": Kernel("cuda"), "cpu": Kernel("cpu")},
    "cross_entropy": {
        "cuda": Kernel("cuda", lacks=_CROSS_ENTROPY_LACKS),
        "triton": Kernel("triton", lacks=_CROSS_ENTROPY_LACKS),
        "cpu": Kernel("cpu", lacks=_CROSS_ENTROPY_LACKS),
    },
    "embedding": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")},
    "rotary_embedding": {
        "cuda": Kernel("cuda", lacks=_lacks("table_grad")),
        "triton": Kernel("triton", lacks=_lacks("table_grad")),
        "cpu": Kernel("cpu", lacks=_lacks("table_grad")),
    },
    "linear_cross_entropy": {
        "triton": Kernel("triton", lacks=_LINEAR_LOSS_LACKS),
        "cpu": Kernel("cpu", lacks=_LINEAR_LOSS_LACKS),
    },
    "linear_softmax": {
        "triton": Kernel("triton", backward_from=_LINEAR_SOFTMAX),
        "cpu": Kernel("cpu", backward_from=_LINEAR_SOFTMAX),
    },
    "linear_topk": {"triton": Kernel("triton"), "cpu": Kernel("cpu")},
}
#: Steps that composed operations are made of beside other operations: kernels, not in public.
STEPS: dict[str, dict[str, Kernel]] = {
    "activation": {"cuda": Kernel("cuda"), "triton": Kernel("triton"), "cpu": Kernel("cpu")}
}

for _row in TABLE.values():
    _row["torch"] = Kernel("torch")

#: Operations made of calls of another: they run wherever that one does, so its row is theirs.
COMPOSED = {"feed_forward": "linear_add"}
TABLE.update((op, TABLE[other]) for op, other in COMPOSED.items())

#: Operations whose kernels are found in another's file (same schema family, same row of the table).
ALIASES = {"log_softmax": "softmax", "scaled_dot_product_attention": "attention"}


# ---- libraries ----------------------------------------------------------------------------------

_NAMESPACES = {
    "cpu": "fasttransformer",
    "cuda": "fasttransformer",
    "triton": "fasttransformer_triton",
}
#: Why a backend is not available in this process; absent = available.
_unavailable: dict[str, str] = {}


def _library(name: str) -> Path:
    return Path(__file__).with_name(f"_{name}.abi3.so")


def _load_cpu() -> str | None:
    path = _library("cpu")
    if not path.exists():
        return "the C++ library was not built (install with a C++ compiler and without FASTTRANSFORMER_NO_BUILD)"  # noqa: E501
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ library does not load: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    path = _library("cuda")
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if not path.exists():
        return "the CUDA library was not built (needs nvcc and a CUDA build of torch; see `fasttransformer info`)"  # noqa: E501
    if "cpu" in _unavailable:
        return f"it needs the C++ library's schemas: {_unavailable['cpu']}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA library does not load: {error.__cause__ or error}"
    return None


@functools.cache
def _gpu_problem() -> str | None:
    """Why the CUDA library can't run on a GPU that is here. Asked before the first call on one and
    not at import, since the question starts CUDA, after which a process can't fork."""
    problem_of = ctypes.CDLL(str(_library("cuda"))).ft_cuda_problem
    problem_of.restype = ctypes.c_char_p
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"GPU {device} ({torch.cuda.get_device_name(device)})"
        if major < 8:
            return f"{gpu} is of compute capability {major}.{minor}; the CUDA kernels need 8.0 or later"  # noqa: E501
        problem = problem_of(major, minor).decode()
        if problem:
            return f"{gpu}: {problem}"
    return None


def cuda_library() -> dict[str, Any] | None:
    """What the CUDA library on disk was built for, whether or not it can be loaded here."""
    path = _library("cuda")
    if not path.exists():
        return None
    marker = rb"fasttransformer CUDA library: archs ([^;]*); nvcc ([^;]*);"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(marker, content)
        archs, nvcc = (group.decode() for group in found.groups()) if found else ("unknown",) * 2
    return {"archs": archs, "nvcc": nvcc, "bytes": path.stat().st_size}


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


#: GPU backends that are made to run on CPU tensors beside Triton's interpreter, for tests.
EMULATED: set[str] = set()


def _load_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    if not interpreted() and not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    importlib.import_module("fasttransformer.kernels")
    return None


def _bind() -> None:
    """Loads what there is and puts each kernel's operators into the table."""
    for name, load in (("cpu", _load_cpu), ("cuda", _load_cuda), ("triton", _load_triton)):
        problem = load()
        if problem is not None:
            _unavailable[name] = problem
    for op, row in (*TABLE.items(), *STEPS.items()):
        for backend, kernel in row.items():
            if backend == "torch" or backend in _unavailable:
                continue
            for part, name in (("forward", op), ("backward", f"{op}_backward")):
                overload = _operator(backend, name)
                if overload is not None:
                    object.__setattr__(kernel, part, overload)


def _operator(backend: str, name: str) -> Any:
    """The operator, or None if the loaded library does not implement it for the backend."""
    namespace = _NAMESPACES[backend]
    if backend == "cpu" or (backend == "triton" and interpreted()):
        key = "CPU"
    else:
        key = "CUDA" if torch.cuda.is_available() else "XPU"
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return None
    implemented = torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)
    return packet.default if implemented else None


def operator_namespaces() -> list[str]:
    """The ``torch.ops`` namespaces that are defined in this process (for fake kernels)."""
    found = []
    if "cpu" not in _unavailable:
        found.append("fasttransformer")
    if "triton" not in _unavailable:
        found.append("fasttransformer_triton")
    return found


# ---- choosing -----------------------------------------------------------------------------------


#: The backend that every call must use, if any. The environment's name is checked by the first
#: call, so that a misspelt one is an error of that call and not of the import.
_forced: str | None = os.environ.get("FASTTRANSFORMER_BACKEND") or None


def _check_name(backend: str) -> None:
    if backend not in NAMES:
        source = "FASTTRANSFORMER_BACKEND" if backend == _forced else "backend"
        raise ValueError(f"{source}: {backend!r} is not one of {', '.join(NAMES)}")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces one backend within a ``with`` block, for every operation of the process.

    A forced backend that can't do a case raises with its reason; it never falls back in silence.

    Raises:
        ValueError: ``backend`` is not a backend's name.

    >>> import torch, fasttransformer as ft
    >>> with ft.use_backend("torch"):
    ...     ft.softmax(torch.zeros(2))
    tensor([0.5000, 0.5000])
    """
    global _forced
    _check_name(backend)
    before = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    return _forced


def _device_reason(backend: str, device_type: str) -> str | None:
    if backend == "torch":
        return None
    if backend in _unavailable:
        return _unavailable[backend]
    if device_type == "cpu" and (backend in EMULATED or (backend == "triton" and interpreted())):
        return None
    if backend not in ORDER.get(device_type, ()):
        return f"it does not run on {device_type} tensors"
    return _gpu_problem() if backend == "cuda" else None


#: (op, device type, dtype, options, sizes, forced) → kernel. Metadata repeats from call to call,
#: and a look-up costs a tenth of a decision.
_chosen: dict[tuple, Kernel] = {}


def choose(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    options: frozenset[str] = frozenset(),
    sizes: tuple[tuple[str, int], ...] = (),
    backend: str | None = None,
) -> Kernel:
    """The kernel that runs a case.

    ``options`` names what of the operation's optional parts is in use, with ``"grad"`` among them
    when a gradient is needed; ``sizes`` names the sizes that kernels limit.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: a forced backend can't do the case; the message has its reason.
    """
    forced = backend if backend is not None else _forced
    key = (op, device_type, dtype, options, sizes, forced)
    if _probing:
        raise _Probe(*key)
    kernel = _chosen.get(key)
    if kernel is None:
        kernel = _decide(op, device_type, dtype, options, sizes, forced)
        _chosen[key] = kernel
    return kernel


def _decide(op, device_type, dtype, options, sizes, forced) -> Kernel:
    if forced is not None:
        _check_name(forced)
    for name, kernel, reason in considered(op, device_type, dtype, options, sizes, forced):
        if reason is None:
            return kernel
        if forced is not None:
            raise RuntimeError(f"{op}: backend {name!r} was asked for but can't do this: {reason}")
    raise AssertionError("the torch backend does every case")


def considered(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    options: frozenset[str] = frozenset(),
    sizes: tuple[tuple[str, int], ...] = (),
    forced: str | None = None,
) -> Iterator[tuple[str, Kernel, str | None]]:
    """(backend, kernel, reason or None) in the order in which backends are tried."""
    row = TABLE[ALIASES.get(op, op)]
    names = (forced,) if forced is not None else ORDER.get(device_type, ("torch",))
    for name in names:
        kernel = row.get(name)
        if kernel is None:
            yield name, row["torch"], "it has no kernel for this operation yet"
        else:
            reason = _device_reason(name, device_type)
            yield name, kernel, reason or kernel.unsupported(dtype, options, sizes)


# ---- looking ------------------------------------------------------------------------------------


def unavailable(name: str) -> str | None:
    """Why a backend can't run in this process, or None."""
    if name == "cuda" and name not in _unavailable and name not in EMULATED:
        return _gpu_problem()
    return _unavailable.get(name)


def backends() -> dict[str, str | None]:
    """Backend → None if it can run in this process, else why not.

    >>> import fasttransformer as ft
    >>> ft.backends()["torch"] is None
    True
    """
    return {name: unavailable(name) for name in NAMES}


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the backend that runs and why the ones before it don't."""

    op: str
    case: str
    backend: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}({self.case}) runs on: {self.backend}"]
        lines += [f"  {name}: no, {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


class _Probe(Exception):  # not an error: how explain() leaves an operation's front
    def __init__(self, *case: Any) -> None:
        self.case = case


_probing = False


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{', '.join(map(str, value.shape))}]"
    return repr(value)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``ft.<op>(*args, **kwargs)`` would run on, and why not the ones before it.

    The arguments are checked as in a call; nothing is computed.

    Raises:
        ValueError: ``op`` is not an operation; and what the call itself raises.

    >>> import torch, fasttransformer as ft
    >>> ft.explain("softmax", torch.zeros(2, 3), backend="torch").backend
    'torch'
    """
    global _probing
    from . import ops

    if op not in TABLE and op not in ALIASES:
        raise ValueError(f"explain: {op!r} is not an operation; it is one of {', '.join(TABLE)}")
    function = getattr(ops, op)
    _probing = True
    try:
        function(*args, **kwargs)
    except _Probe as probe:
        case = probe.case
    else:
        raise AssertionError(f"{op} never asked for a backend")
    finally:
        _probing = False
    words = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    rejected: list[tuple[str, str]] = []
    for name, _, reason in considered(*case):
        if reason is None:
            return Explanation(op, ", ".join(words), name, tuple(rejected))
        rejected.append((name, reason))
    return Explanation(op, ", ".join(words), "none", tuple(rejected))


_bind()
