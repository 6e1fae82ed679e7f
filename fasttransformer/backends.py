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
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import _libraries
from ._libraries import interpreted

NAMES = ("cuda", "triton", "cpu", "torch")
F32_AND_16_BIT = (torch.float32, torch.float16, torch.bfloat16)

#: The order in which backends are tried, by device type: the first that can do a case runs it.
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),  # ROCm's device is called cuda too; it has no CUDA library
    "xpu": ("triton", "torch"),
}
#: What :func:`explain` adds where an order is a prediction and not a measurement.
UNMEASURED: Mapping[str, str] = {
    "cuda": "that cuda comes before triton is a prediction: neither has been timed on a GPU. On "
    "Hopper the Triton kernels compile to wgmma and the CUDA kernels to mma.sync, so triton may be "
    'the faster one for attention; try both with backend="cuda" and backend="triton"',
}


#: Options that no kernel of any operation has → the reason.
BEYOND_KERNELS: Mapping[str, str] = {
    "second_derivative": "a gradient of a gradient is wanted, or more; kernels have the first only",
    "forward_mode": "a derivative in forward mode is wanted (torch.func.jvp, jacfwd, "
    "forward_ad); kernels have gradients only",
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
        for option, reason in BEYOND_KERNELS.items():
            if option in options:
                return reason
        missing = sorted(options & self.lacks)
        if missing:
            return f"no {' or '.join(missing)} in this kernel yet"
        if "grad" in options:
            missing = sorted(options & self.no_backward)
            if missing:
                return f"no backward with {' or '.join(missing)} in this kernel yet"
            if self.backward is None and not self.backward_from:
                return "it has no backward kernel for this operation"
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

#: The ``torch.ops`` namespace of each backend's operators.
NAMESPACES = {
    "cpu": "fasttransformer",
    "cuda": "fasttransformer",
    "triton": "fasttransformer_triton",
}
#: Why a backend is not available in this process; absent = available.
_unavailable: dict[str, str] = {}


def _bind() -> None:
    """Loads what there is and puts each kernel's operators into the table."""
    for name, load in (
        ("cpu", _libraries.load_cpu),
        ("cuda", lambda: _libraries.load_cuda(_unavailable.get("cpu"))),
        ("triton", _libraries.load_triton),
    ):
        problem = load()
        if problem is not None:
            _unavailable[name] = problem
    for row in _rows():
        for backend, kernel in row[1].items():
            if backend == "torch" or backend in _unavailable:
                continue
            found = {
                part: overload
                for part, name in (("forward", row[0]), ("backward", f"{row[0]}_backward"))
                if (overload := _operator(backend, name)) is not None
            }
            row[1][backend] = replace(kernel, **found)


def _rows() -> list[tuple[str, dict[str, Kernel]]]:
    """(operation, its row) of the operations and steps that have kernels of their own."""
    table = (*TABLE.items(), *STEPS.items())
    return [(op, row) for op, row in table if op not in COMPOSED]


def _operator(backend: str, name: str) -> Any:
    """The operator, or None if the loaded library does not implement it for the backend."""
    namespace = NAMESPACES[backend]
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


# ---- other kernels in the table's place ---------------------------------------------------------

#: backend → the type of device on whose tensors it runs within an `override` that names one.
_emulated: dict[str, str] = {}


@contextlib.contextmanager
def override(
    backend: str, kernels: Mapping[str, Kernel], *, device_type: str | None = None
) -> Iterator[None]:
    """Puts other kernels of one backend into the table, within a ``with`` block.

    For tests and for trying out a kernel: ``kernels`` maps operations (and steps) to the kernels
    that stand in the place of the table's; :func:`dataclasses.replace` makes one from the table's
    own. An operation that is composed of another has that one's row. With ``device_type`` the
    backend counts as available for tensors of that type of device, whether or not its library is
    loaded, and the kernels given must be able to run on them. Unlike
    :func:`use_backend`, it holds for every thread of the process.

    Raises:
        ValueError: ``backend`` is not a backend's name, or a name is no operation with a row of its
            own.

    >>> from dataclasses import replace
    >>> import torch, fasttransformer as ft
    >>> from fasttransformer.backends import TABLE, override
    >>> slow = replace(TABLE["softmax"]["cpu"], limits={"columns": 1}, dtypes=())
    >>> with override("cpu", {"softmax": slow}):
    ...     ft.explain("softmax", torch.zeros(2, 3)).backend
    'torch'
    """
    _check_name(backend)
    rows = dict(_rows())
    for op in kernels:
        if op not in rows:
            raise ValueError(f"override: {op!r} has no row; it is one of {', '.join(rows)}")
    before = {op: rows[op].get(backend) for op in kernels}
    emulated = _emulated.get(backend)
    for op, kernel in kernels.items():
        rows[op][backend] = kernel
    if device_type is not None:
        _emulated[backend] = device_type
    _chosen.clear()
    try:
        yield
    finally:
        for op, own in before.items():
            if own is None:
                del rows[op][backend]
            else:
                rows[op][backend] = own
        if emulated is None:
            _emulated.pop(backend, None)
        else:
            _emulated[backend] = emulated
        _chosen.clear()


# ---- choosing -----------------------------------------------------------------------------------


_FORCED_BY_ENVIRONMENT = os.environ.get("FASTTRANSFORMER_BACKEND") or None


class _Thread(threading.local):
    """What holds for the calls of one thread. (Not a context variable: torch.compile can't trace
    those, while it traces this and checks it before each call of what it compiled.)"""

    def __init__(self) -> None:  # runs in each thread; torch.compile checks no class's attributes
        #: The backend that every call must use, if any. The environment's name is checked by the
        #: first call, so that a misspelt one is an error of that call and not of the import.
        self.forced: str | None = _FORCED_BY_ENVIRONMENT
        #: Whether :func:`explain` is asking, so that an operation stops where it has its backend.
        self.probing = False


_thread = _Thread()


def _check_name(backend: str) -> None:
    if backend not in NAMES:
        source = "FASTTRANSFORMER_BACKEND" if backend == _thread.forced else "backend"
        raise ValueError(f"{source}: {backend!r} is not one of {', '.join(NAMES)}")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces one backend within a ``with`` block, for every operation that this thread calls.

    Other threads are not concerned: the environment variable ``FASTTRANSFORMER_BACKEND`` forces a
    backend in all of them. A forced backend that can't do a case raises with its reason; it never
    falls back in silence.

    Raises:
        ValueError: ``backend`` is not a backend's name.

    >>> import torch, fasttransformer as ft
    >>> with ft.use_backend("torch"):
    ...     ft.softmax(torch.zeros(2))
    tensor([0.5000, 0.5000])
    """
    _check_name(backend)
    before = _thread.forced
    _thread.forced = backend
    try:
        yield
    finally:
        _thread.forced = before


def forced_backend() -> str | None:
    return _thread.forced


def _device_reason(backend: str, device_type: str) -> str | None:
    if backend == "torch":
        return None
    if _emulated.get(backend) == device_type:
        return None
    if backend in _unavailable:
        return _unavailable[backend]
    if device_type == "cpu" and backend == "triton" and interpreted():
        return None
    if backend not in ORDER.get(device_type, ()):
        return f"it does not run on {device_type} tensors"
    return _libraries.gpu_problem() if backend == "cuda" else None


#: (op, device type, dtype, options, sizes, forced) → kernel. Metadata repeats from call to call,
#: and a look-up costs a tenth of a decision.
_chosen: dict[tuple, Kernel] = {}


def _after_fork() -> None:
    """In a forked child: the next decision is made anew, see :func:`_decide`."""
    global _lost_threads
    _lost_threads = True
    _chosen.clear()


#: Whether this process was forked and has not decided anything since.
_lost_threads = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        RuntimeError: a forced backend can't do the case; the message has its reason. Where that
            is a derivative which kernels don't have, NotImplementedError, which is one.
    """
    forced = backend if backend is not None else _thread.forced
    key = (op, device_type, dtype, options, sizes, forced)
    if _thread.probing:
        raise _Probe(*key)
    kernel = _chosen.get(key)
    if kernel is None:
        kernel = _decide(op, device_type, dtype, options, sizes, forced)
        _chosen[key] = kernel
    return kernel


def _decide(op, device_type, dtype, options, sizes, forced) -> Kernel:
    global _lost_threads
    if _lost_threads:
        # torch's operations next to our kernels would wait for the parent's threads for ever, as
        # they do in a child that never calls us. For kernels see csrc/cpu/parallel.cpp.
        _lost_threads = False
        torch.set_num_threads(1)
    if forced is not None:
        _check_name(forced)
    for name, kernel, reason in considered(op, device_type, dtype, options, sizes, forced):
        if reason is None:
            return kernel
        if forced is not None:
            error = NotImplementedError if options & {*BEYOND_KERNELS} else RuntimeError
            raise error(f"{op}: backend {name!r} was asked for but can't do this: {reason}")
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
    if name in _emulated:
        return None
    if name == "cuda" and name not in _unavailable:
        return _libraries.gpu_problem()
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
    """What :func:`explain` found: the backend that runs and why the ones before it don't.

    ``note`` says what the reader should know of the choice itself, if anything.
    """

    op: str
    case: str
    backend: str
    rejected: tuple[tuple[str, str], ...]
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}({self.case}) runs on: {self.backend}"]
        lines += [f"  {name}: no, {reason}" for name, reason in self.rejected]
        lines += [f"  note: {self.note}"] if self.note else []
        return "\n".join(lines)


def decision(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    options: frozenset[str] = frozenset(),
    sizes: tuple[tuple[str, int], ...] = (),
    forced: str | None = None,
    *,
    case: str = "",
) -> Explanation:
    """What :func:`choose` decides for the same arguments, explained."""
    rejected: list[tuple[str, str]] = []
    fits: list[str] = []
    for name, _, reason in considered(op, device_type, dtype, options, sizes, forced):
        if reason is None:
            fits.append(name)
        elif not fits:
            rejected.append((name, reason))
    unmeasured = forced is None and {"cuda", "triton"} <= {*fits}
    note = UNMEASURED.get(device_type, "") if unmeasured else ""
    return Explanation(op, case, fits[0] if fits else "none", tuple(rejected), note)


class _Probe(Exception):  # not an error: how explain() leaves an operation's front
    def __init__(self, *case: Any) -> None:
        self.case = case


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
    from . import ops

    if op not in TABLE and op not in ALIASES:
        raise ValueError(f"explain: {op!r} is not an operation; it is one of {', '.join(TABLE)}")
    function = getattr(ops, op)
    _thread.probing = True
    try:
        function(*args, **kwargs)
    except _Probe as probe:
        case = probe.case
    else:
        raise AssertionError(f"{op} never asked for a backend")
    finally:
        _thread.probing = False
    words = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return replace(decision(*case, case=", ".join(words)), op=op)


_bind()
