"""The number contract of design.md as one function, and the backends that a test runs on.

    max |out − ref64| ≤ 2 · max |peer − ref64| + one rounding step of the output's dtype

``ref64`` is the reference in float64 on the same inputs, ``peer`` the same computation in plain
PyTorch and the output's own dtype. The comparison itself is the package's (``_contract.py``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import card
import launches
import simt
import torch
from torch import Tensor

from fasttransformer._contract import (
    DRAWS,
    Comparison,
    compare,
    compare_runs,
    fairly,
    outputs_and_gradients,
    rounding_step,
    runnable,
)
from fasttransformer._contract import device_of as device_of_backend
from fasttransformer._contract import running_on as running_on_device
from fasttransformer.backends import NAMESPACES, STEPS, TABLE

__all__ = [
    "RUNNABLE",
    "On",
    "assert_close",
    "assert_fair",
    "backends_of",
    "check",
    "rounding_step",
    "runnable",
    "running_on",
]

#: What runs here: the package's backends, and "simt": the CUDA kernels' source on the CPU.
RUNNABLE = [*runnable(), *([] if simt.missing() else ["simt"])]


class On(str):
    """An entry of :data:`RUNNABLE` on which a test runs an operation.

    On what launches kernels (``launches.COUNTED``) the test is held to it: :func:`running_on` and
    :func:`check` fail where no kernel of ``op`` was launched.
    """

    op: str | None = None

    def __new__(cls, name: str, op: str | None = None) -> On:
        self = super().__new__(cls, name)
        self.op = op if op is not None else getattr(name, "op", None)
        return self

    def __reduce__(self) -> tuple:
        return On, (str(self), self.op)


def backends_of(op: str) -> list[str]:
    """The entries of :data:`RUNNABLE` that have a kernel for ``op``."""
    row = {**TABLE, **STEPS}[op]
    kernels = {name for name, kernel in row.items() if name == "torch" or kernel.forward}
    if "cuda" in row:
        kernels.add("simt")
    return [On(name, op) for name in RUNNABLE if name.split(":")[0] in kernels]


@contextlib.contextmanager
def running_on(name: str, *, launched: bool | None = True) -> Iterator[str]:
    """Forces an entry of :data:`RUNNABLE`; gives the name of its backend.

    Tests make their tensors on the CPU, whatever the backend; those of a GPU carry them there
    (``card.py``).

    A kernel of the operation that ``name`` was made for (:class:`On`), or of any where it names
    none, must be launched within. ``launched=False``: none may be (an error comes before, there is
    nothing to compute); None: tensors are empty, for which some kernels run and some don't.
    """
    with launches.recorded() as found:
        if name == "simt":
            with simt.running():
                with card.rehearsed() if card.REHEARSED else contextlib.nullcontext():
                    yield "cuda"
        elif name in ("cuda", "triton") and device_of_backend(name) != "cpu":
            with card.running(name, NAMESPACES[name], device_of_backend(name)):
                yield name
        else:
            with running_on_device(name) as backend:
                yield backend
    launches.checked()
    if launched is False:
        found.require_none(name)
    elif launched:
        found.require_any(name, getattr(name, "op", None))


def assert_close(out: Tensor, ref64: Tensor, peer: Tensor, what: str = "out") -> None:
    """Holds ``out`` to the contract; NaN and infinities must stand where the reference has them."""
    _hold(compare(out, ref64, peer), what)


def _hold(found: Comparison, what: str) -> None:
    if found.problem is not None:
        raise AssertionError(f"{what}: {found.problem}")


def assert_fair(draw: Callable[[], Mapping[str, Comparison]]) -> Mapping[str, Comparison]:
    """Holds each named comparison to the contract; what breaks it, by the mean over new draws.

    For tensors of a few numbers, or that hang on one ill-conditioned row, where the ratio of two
    single largest errors is luck (``fasttransformer._contract.mean``). ``draw`` makes new inputs of
    the same kind in each call. Over 32 draws a factor of 2 is 5 standard deviations.
    """
    first = draw()
    for name, found in fairly(first, draw, 2 * DRAWS).items():
        _hold(found, name)
    return first


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    *,
    grads: bool = True,
    on: str = "torch",
    peer: Callable[..., Any] | None = None,
    redraw: Callable[[], Sequence[Tensor | None]] | None = None,
) -> None:
    """Compares ``function(*inputs)`` and its gradients with ``reference`` in float64.

    Each callable takes the tensors and returns a tensor or a tuple of tensors. Gradients are taken
    of every floating-point input, for one random cotangent per output (shared by all three runs).
    ``peer`` defaults to ``reference`` run in the inputs' own dtype. ``redraw`` makes new inputs of
    the same kind; with it the mean over draws decides (:func:`assert_fair`) where these inputs
    break the contract.
    """
    peer = peer or reference
    run = functools.partial(outputs_and_gradients, grads=grads)

    def compared(given: Sequence[Tensor | None]) -> dict[str, Comparison]:
        with launches.recorded() as launched, running_on(on, launched=None):
            ours = run(function, given)
        if all(x.numel() for x in (*given, *ours[0]) if x is not None):
            gradients = any(x is not None for x in ours[1])
            launched.require(on, getattr(on, "op", None), backward=gradients)
        return compare_runs(ours, run(reference, given, dtype=torch.float64), run(peer, given))

    first = compared(inputs)
    if redraw is None or all(f.problem is None for f in first.values()):
        for name, found in first.items():
            _hold(found, name)
        return
    draws = itertools.chain([first], (compared(redraw()) for _ in itertools.count()))
    assert_fair(lambda: next(draws))
