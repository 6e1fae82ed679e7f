"""What was launched: a test on simt, cuda or triton must prove that it ran what it names.

Kernels of the CUDA source count themselves, on a GPU and in simt, by the name that they are
launched with (``attention_backward_dq``); Triton's are counted at their launch, under the name of
the operator of ``fasttransformer_triton`` that launched them. :func:`require` holds a stretch of a
test to an operation: one of its kernels must have been launched there.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator

import torch

from fasttransformer._libraries import library_path
from fasttransformer.backends import ALIASES, COMPOSED, STEPS, TABLE, backends

#: What has to launch kernels of its own: the CUDA source in simt or on a GPU, and Triton.
COUNTED = ("simt", "cuda", "triton")

#: Operations that launch another's kernels.
SAME_KERNELS = {
    **ALIASES,
    **COMPOSED,
    "attention_varlen": "attention",
    "attention_decode": "attention",
}
#: Operations whose gradient another's backward kernels compute, in the CUDA source.
SAME_BACKWARD = {"add_layer_norm": "layer_norm", "add_rms_norm": "rms_norm"}
#: Operations without backward kernels: a rotation is undone by the same kernel, and the loss's
#: kernel makes the gradients as well.
NO_BACKWARD = {"rotary_embedding", "linear_cross_entropy"}
OPERATIONS = sorted({*TABLE, *STEPS}, key=len, reverse=True)

_counts: collections.Counter[tuple[str, str]] = collections.Counter()
_libraries: dict[str, tuple[str, Callable[[], str]]] = {}
_recording: list[Launches] = []


def watch(path: str, source: str) -> None:
    """Counts the launches of a library that exports ``ft_launch_counts`` from now on, as of simt or
    cuda."""
    library = ctypes.CDLL(path)
    if not hasattr(library, "ft_launch_counts"):
        raise RuntimeError(
            f"{path} is older than these tests, which count its launches: build it again"
        )
    exchange = library.ft_launch_counts
    exchange.restype = ctypes.c_int64
    exchange.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int64]
    text = ctypes.create_string_buffer(1 << 16)

    def counted() -> str:
        if exchange(1, text, len(text)) > len(text):
            raise AssertionError("launches: more names than the buffer holds")
        return text.value.decode()

    counted()
    _libraries[path] = source, counted


@functools.cache
def _watch_backends() -> None:
    """Counts the launches of what this process has besides simt: the CUDA library, and Triton."""
    if torch.cuda.is_available() and library_path("cuda").exists():
        watch(str(library_path("cuda")), "cuda")
    if backends()["triton"] is None:
        from triton.runtime.jit import KernelInterface

        plain = KernelInterface.__getitem__

        def counting(kernel: KernelInterface, grid: object) -> Callable[..., object]:
            launch = plain(kernel, grid)

            def launch_and_count(*args: object, **kwargs: object) -> object:
                result = launch(*args, **kwargs)
                _counts["triton", _operator_that_launches()] += 1
                return result

            return launch_and_count

        KernelInterface.__getitem__ = counting


def _operator_that_launches() -> str:
    """The Triton operator in whose call a kernel is being launched: the outermost function of
    ``fasttransformer.kernels`` on the stack that is an operator."""
    found, frame = "a kernel outside any operator", sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_globals.get("__name__", "").startswith("fasttransformer.kernels."):
            if name.removesuffix("_backward") in OPERATIONS:
                found = name
        frame = frame.f_back  # type: ignore[assignment]
    return found


def total() -> collections.Counter[tuple[str, str]]:
    """Launches by (simt, cuda or triton, name) since the process began to count."""
    _watch_backends()
    for source, counted in _libraries.values():
        for line in counted().splitlines():
            name, count = line.split("\t")
            _counts[source, name] += int(count)
    return collections.Counter(_counts)


def _owner(kernel: str) -> str | None:
    """The operation of a kernel's or operator's name: the longest that it begins with."""
    name = kernel.partition(" ")[0]
    return next((op for op in OPERATIONS if f"{name}_".startswith(f"{op}_")), None)


def operations_of(op: str) -> set[str]:
    """The operations whose kernels an operation launches."""
    return {op, SAME_KERNELS.get(op, op)}


def backward_operations_of(op: str, backend: str) -> set[str]:
    """Those whose backward kernels its gradient launches."""
    kernel = TABLE.get(ALIASES.get(op, op), STEPS.get(op, {})).get(backend)
    found = {*operations_of(op), *(kernel.backward_from if kernel else ())}
    return found | {SAME_BACKWARD[of] for of in found if of in SAME_BACKWARD}


def of_operation(names: collections.Counter[str], ops: set[str], backward: bool) -> dict[str, int]:
    """The launches among ``names`` of the forward or backward kernels of some operations."""
    found = {}
    for name, count in names.items():
        owner = _owner(name)
        if owner in ops and ("_backward" in name) == backward:
            found[name] = count
    return found


class Launches:
    """What a ``with`` block launched; :meth:`require` is asked after it."""

    def __init__(self) -> None:
        self.by_source: collections.Counter[tuple[str, str]] = collections.Counter()
        #: Whether a stretch within was held to its operation already (``contract.running_on``).
        self.checked = False

    def on(self, source: str) -> collections.Counter[str]:
        """Launches by name on simt, cuda or triton."""
        found = {name: n for (where, name), n in self.by_source.items() if where == source}
        return collections.Counter(found)

    def require(self, on: str, op: str | None, *, forward: bool = True, backward: bool) -> None:
        """AssertionError unless kernels of ``op`` were launched (None: of any operation)."""
        if on not in COUNTED:
            return
        if op is None:
            assert self.on(on), f"no kernel was launched on {on}"
            return
        backend = "cuda" if on == "simt" else on
        wanted = [(False, operations_of(op))] if forward else []
        if backward and op not in NO_BACKWARD:
            wanted.append((True, backward_operations_of(op, backend)))
        for is_backward, ops in wanted:
            assert of_operation(self.on(on), ops, is_backward), (
                f"no {'backward' if is_backward else 'forward'} kernel of {op} was launched on "
                f"{on}; launched: {dict(self.by_source) or 'nothing'}"
            )

    def require_any(self, on: str, op: str | None) -> None:
        """AssertionError unless a kernel of ``op``, forward or backward, was launched."""
        if on not in COUNTED:
            return
        backend = "cuda" if on == "simt" else on
        if op is None:
            return self.require(on, None, backward=False)
        ops, names = operations_of(op), self.on(on)
        found = of_operation(names, ops, False) | of_operation(
            names, backward_operations_of(op, backend), True
        )
        assert found, (
            f"no kernel of {op} was launched on {on}; launched: {dict(self.by_source) or 'nothing'}"
        )

    def require_none(self, on: str) -> None:
        """AssertionError if anything was launched."""
        assert on not in COUNTED or not self.by_source, (
            f"said to launch nothing on {on}, but launched {dict(self.by_source)}"
        )


@contextlib.contextmanager
def recorded() -> Iterator[Launches]:
    """Counts what the ``with`` block launches."""
    before, found = total(), Launches()
    _recording.append(found)
    try:
        yield found
    finally:
        _recording.remove(found)
        found.by_source = total() - before


def checked() -> None:
    """Says that a stretch was held to its operation, to all who record around it."""
    for found in _recording:
        found.checked = True
