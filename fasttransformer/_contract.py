"""The number contract, which tests, ``fasttransformer check`` and ``report.verify`` are held to:

    max |out − ref64| ≤ 2 · max |peer − ref64| + one rounding step of the output's dtype

``ref64`` is the reference in float64 on the same inputs, ``peer`` the same computation in plain
PyTorch and the output's own dtype; the rounding step is taken at the largest magnitude of ref64.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import backends, use_backend

#: The CPU kernels' instruction sets, lowest first. ``runnable`` says which of them run here.
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@dataclass(frozen=True)
class Comparison:
    """How far an output is from the truth, how far it may be, and what is wrong (None: nothing)."""

    error: float = 0.0
    allowed: float = 0.0
    peer_error: float = 0.0
    problem: str | None = None


def rounding_step(dtype: torch.dtype, magnitude: float) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``magnitude``.

    >>> rounding_step(torch.float32, 1.5) == 2.0**-23
    True
    """
    if magnitude == 0 or not math.isfinite(magnitude):
        return torch.finfo(dtype).tiny
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))


def compare(out: Tensor, ref64: Tensor, peer: Tensor) -> Comparison:
    """Holds ``out`` to the contract; NaN and infinities must stand where the reference has them.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> compare(one.float(), one, one.float()).problem is None
    True
    >>> compare(one.float() + 1e-3, one, one.float()).problem
    'error 0.001 > 1.19e-07 (peer 0, rounding step 1.19e-07)'
    """
    if out.shape != ref64.shape:
        return Comparison(problem=f"shape {tuple(out.shape)} != {tuple(ref64.shape)}")
    if out.numel() == 0:
        return Comparison()
    got, want, other = (t.detach().to("cpu", torch.float64) for t in (out, ref64, peer))
    finite = want.isfinite()
    if not torch.equal(got.isnan(), want.isnan()):
        return Comparison(problem="NaN in other places than the reference")
    infinite = want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        return Comparison(problem="infinities in other places than the reference")
    if not finite.any():
        return Comparison()
    error = (got - want)[finite].abs().max().item()
    usable = finite & other.isfinite()  # where the peer itself fails it gives no allowance
    peer_error = (other - want)[usable].abs().max().item() if usable.any() else 0.0
    step = rounding_step(out.dtype, want[finite].abs().max().item())
    allowed = 2 * peer_error + step
    problem = None
    if not error <= allowed:
        problem = (
            f"error {error:.3g} > {allowed:.3g} (peer {peer_error:.3g}, rounding step {step:.3g})"
        )
    return Comparison(error, allowed, peer_error, problem)


#: New draws of the rounding where the ratio of single errors breaks the rule. The ratio of two
#: errors varies by a factor of 2.2 (the deviation of its logarithm is 0.8 in deep models), the mean
#: of 16 by 1.2: the bound of 2 is 3.5 deviations away.
DRAWS = 16


def mean(draws: Sequence[Comparison]) -> Comparison:
    """Geometric means over draws; an error that is tiny by luck counts as allowed / 16.

    Where a tensor hangs on one ill-conditioned row, the ratio of two single largest errors is luck.
    New draws, with what goes in moved by a few roundings, tell luck from a kernel that is worse:
    the mean is held to the contract, so no draw makes up for the others.

    >>> found = mean([Comparison(1.0, 4.0, 2.0), Comparison(4.0, 4.0, 2.0)])
    >>> found.error, found.allowed, found.problem
    (2.0, 4.0, None)
    """

    def over(name: str) -> float:
        values = (max(getattr(d, name), d.allowed / 16) for d in draws)
        return 2.0 ** (math.fsum(math.log2(value) for value in values) / len(draws))

    error, allowed, peer_error = map(over, ("error", "allowed", "peer_error"))
    problem = None
    if not error <= allowed:
        problem = f"mean error {error:.3g} > {allowed:.3g} over {len(draws)} draws"
    return Comparison(error, allowed, peer_error, problem)


def fairly(
    first: Mapping[str, Comparison], again: Callable[[], Mapping[str, Comparison]], draws: int
) -> dict[str, Comparison]:
    """``first`` with the :func:`mean` over new draws in place of what broke the contract.

    A NaN or an infinity in the wrong place, a wrong shape, is no matter of size and stays.
    """
    broken: dict[str, list[Comparison]] = {
        name: [] for name, found in first.items() if found.problem and found.allowed
    }
    for _ in range(draws if broken else 0):
        found = again()
        for name, drawn in broken.items():
            drawn.append(found[name])
    return {**first, **{name: mean(drawn) for name, drawn in broken.items()}}


def compare_gradients(ours: Tensor | None, ref64: Tensor | None, peer: Tensor | None) -> Comparison:
    """:func:`compare` for gradients, where None (nothing flows back) is as good as zero."""
    if ours is None or ref64 is None or peer is None:
        for who, gradient in (("ours", ours), ("the reference", ref64)):
            if gradient is not None and gradient.any():
                return Comparison(problem=f"only {who} has a gradient")
        return Comparison()
    return compare(ours, ref64, peer)


#: The outputs of a run, and its gradients: what :func:`outputs_and_gradients` returns.
Run = tuple[Sequence[Tensor], Sequence[Tensor | None]]


def compare_runs(ours: Run, exact: Run, peer: Run) -> dict[str, Comparison]:
    """Each output and gradient of a run by name; without gradients of ours, the outputs alone."""
    triples = enumerate(zip(ours[0], exact[0], peer[0], strict=True))
    found = {f"output {i}": compare(*tensors) for i, tensors in triples}
    if ours[1]:
        gradients = enumerate(zip(ours[1], exact[1], peer[1], strict=True))
        for i, three in gradients:
            found[f"gradient of input {i}"] = compare_gradients(*three)
    return found


def outputs_and_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    grads: bool = True,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of ``function(*inputs)`` and the gradient of every floating-point input.

    Floating-point inputs are cast to ``dtype`` first if one is given. Gradients are those of a
    weighted sum of the outputs, the same weights in every run (an output's entries that are not
    finite, like the logarithm of 0, take no part).
    """
    args: list[Tensor | None] = []
    for x in inputs:
        if x is None or not x.is_floating_point():
            args.append(None if x is None else x.to(device))
        else:
            args.append(x.detach().to(device, dtype).requires_grad_(grads))
    out = function(*args)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    if not grads:
        return outs, []
    generator = torch.Generator().manual_seed(7)
    terms = []
    for o in outs:
        if not o.requires_grad:
            continue
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
        terms.append((torch.where(o.isfinite(), o, 0) * weight.to(o.device)).sum())
    loss = torch.stack([term.to(torch.float64) for term in terms]).sum()
    wanted = [a for a in args if a is not None and a.is_floating_point()]
    return outs, list(torch.autograd.grad(loss, wanted, allow_unused=True))


def runnable() -> list[str]:
    """What can run here: "torch", "triton", "cuda", and "cpu:<set>" for each instruction set.

    The sets are those that this CPU has and that ``FASTTRANSFORMER_CPU_ISA`` does not hide.
    """
    available = backends()
    found = [name for name in ("torch", "triton", "cuda") if available[name] is None]
    if available["cpu"] is None:
        before = torch.ops.fasttransformer.cpu_isa()
        for isa in ISAS:
            if torch.ops.fasttransformer.set_cpu_isa(isa):
                found.append(f"cpu:{isa}")
        torch.ops.fasttransformer.set_cpu_isa(before)
    return found


@contextlib.contextmanager
def running_on(name: str) -> Iterator[str]:
    """Forces a backend, and on the CPU an instruction set, within a ``with`` block.

    Raises:
        ValueError: the CPU or the build lacks the instruction set, ``FASTTRANSFORMER_CPU_ISA``
            hides it, or there is no such backend.
    """
    backend, _, isa = name.partition(":")
    if not isa:
        with use_backend(backend):
            yield backend
        return
    before = torch.ops.fasttransformer.cpu_isa()
    if not torch.ops.fasttransformer.set_cpu_isa(isa):
        hidden = os.environ.get("FASTTRANSFORMER_CPU_ISA")
        why = f", or FASTTRANSFORMER_CPU_ISA={hidden} hides them" if hidden else ""
        raise ValueError(f"{name}: this CPU or this build has no {isa} kernels{why}")
    try:
        with use_backend(backend):
            yield backend
    finally:
        torch.ops.fasttransformer.set_cpu_isa(before)


def device_of(name: str) -> str:
    """The device that a backend's tensors live on: a GPU where there is one, else the CPU."""
    if name in ("cuda", "triton") and torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return "cpu"
