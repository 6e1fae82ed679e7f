"""The number contract of design.md as one function, and the backends that a test runs on.

    max |out − ref64| ≤ 2 · max |peer − ref64| + one rounding step of the output's dtype

``ref64`` is the reference in float64 on the same inputs, ``peer`` the same computation in plain
PyTorch and the output's own dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer.backends import TABLE, backends

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def runnable() -> list[str]:
    """What a test can be run on here: "torch", "triton", and "cpu:<instruction set>" of this CPU."""
    found = ["torch"]
    available = backends()
    if available["triton"] is None:
        found.append("triton")
    if available["cuda"] is None:
        found.append("cuda")
    if available["cpu"] is None:
        best = torch.ops.fasttransformer.cpu_isa()
        for isa in ISAS:
            if torch.ops.fasttransformer.set_cpu_isa(isa):
                found.append(f"cpu:{isa}")
        torch.ops.fasttransformer.set_cpu_isa(best)
    return found


RUNNABLE = runnable()


def backends_of(op: str) -> list[str]:
    """The entries of :data:`RUNNABLE` that have a kernel for ``op``."""
    return [name for name in RUNNABLE if name.split(":")[0] in TABLE[op]]


@contextlib.contextmanager
def running_on(name: str) -> Iterator[str]:
    """Forces a backend, and on the CPU an instruction set, within a ``with`` block."""
    backend, _, isa = name.partition(":")
    if not isa:
        with ft.use_backend(backend):
            yield backend
        return
    before = torch.ops.fasttransformer.cpu_isa()
    assert torch.ops.fasttransformer.set_cpu_isa(isa)
    try:
        with ft.use_backend(backend):
            yield backend
    finally:
        torch.ops.fasttransformer.set_cpu_isa(before)


def device_of(name: str) -> str:
    """The device that a backend's tensors live on in tests."""
    if name in ("cuda", "triton") and torch.cuda.is_available():
        return "cuda"
    return "cpu"


def rounding_step(dtype: torch.dtype, magnitude: float) -> float:
    if magnitude == 0 or not math.isfinite(magnitude):
        return torch.finfo(dtype).tiny
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))


def assert_close(out: Tensor, ref64: Tensor, peer: Tensor, what: str = "out") -> None:
    """Holds ``out`` to the contract; NaN and infinities must stand where the reference has them."""
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)} != {tuple(ref64.shape)}"
    if out.numel() == 0:
        return
    got, want, other = (t.detach().to("cpu", torch.float64) for t in (out, ref64, peer))
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), f"{what}: infinities in other places"
    if not finite.any():
        return
    error = (got - want)[finite].abs().max().item()
    usable = finite & other.isfinite()  # where the peer itself fails it gives no allowance
    peer_error = (other - want)[usable].abs().max().item() if usable.any() else 0.0
    step = rounding_step(out.dtype, want[finite].abs().max().item())
    allowed = 2 * peer_error + step
    assert error <= allowed, (
        f"{what}: error {error:.3g} > {allowed:.3g} (peer {peer_error:.3g}, step {step:.3g})"
    )


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    *,
    grads: bool = True,
    on: str = "torch",
    peer: Callable[..., Any] | None = None,
) -> None:
    """Compares ``function(*inputs)`` and its gradients with ``reference`` in float64.

    Each callable takes the tensors and returns a tensor or a tuple of tensors. Gradients are taken
    of every floating-point input, for one random cotangent per output (shared by all three runs).
    ``peer`` defaults to ``reference`` run in the inputs' own dtype.
    """
    peer = peer or reference
    device = device_of(on)

    def run(f: Callable[..., Any], dtype: torch.dtype | None, where: str) -> tuple[list, list]:
        args = []
        for x in inputs:
            if x is None or not x.is_floating_point():
                args.append(None if x is None else x.to(where))
                continue
            y = x.detach().to(where) if dtype is None else x.detach().to(dtype)
            args.append(y.requires_grad_(grads))
        out = f(*args)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        if not grads:
            return outs, []
        generator = torch.Generator().manual_seed(7)
        loss = 0.0
        for o in outs:
            weight = torch.randn(o.shape, generator=generator, dtype=torch.float64)
            # Entries that are ±inf by definition (log of 0) carry no gradient in any of the runs.
            loss = loss + (torch.where(o.isfinite(), o, 0) * weight.to(o.dtype).to(o.device)).sum()
        wanted = [a for a in args if a is not None and a.is_floating_point()]
        return outs, list(torch.autograd.grad(loss, wanted, allow_unused=True))

    with running_on(on):
        ours, our_grads = run(function, None, device)
    wants, want_grads = run(reference, torch.float64, "cpu")
    peers, peer_grads = run(peer, None, "cpu")
    for i, (a, b, c) in enumerate(zip(ours, wants, peers, strict=True)):
        assert_close(a, b, c, f"output {i}")
    for i, (a, b, c) in enumerate(zip(our_grads, want_grads, peer_grads, strict=True)):
        if a is None or b is None:
            assert a is None or not a.any(), f"gradient {i}: there should be none"
            continue
        assert_close(a, b, c, f"gradient {i}")
