"""What the tests of ft.nn share: a module of torch's, ours with the same parameters, the truth.

The truth is torch's module in float64 on the path it trains on (its evaluation path is wrong in
places: known faults b34, b42), with dropout off. The peer is the same in the module's own dtype.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import contract
import fasttransformer as ft
from fasttransformer._contract import compare as compare_tensors
from fasttransformer.backends import TABLE

OURS: dict[type, type] = {
    nn.MultiheadAttention: ft.nn.MultiheadAttention,
    nn.TransformerEncoderLayer: ft.nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: ft.nn.TransformerDecoderLayer,
    nn.TransformerEncoder: ft.nn.TransformerEncoder,
    nn.TransformerDecoder: ft.nn.TransformerDecoder,
    nn.Transformer: ft.nn.Transformer,
    nn.LayerNorm: ft.nn.LayerNorm,
    nn.RMSNorm: ft.nn.RMSNorm,
    nn.Linear: ft.nn.Linear,
    nn.Softmax: ft.nn.Softmax,
    nn.Embedding: ft.nn.Embedding,
}


def ours_of(module: nn.Module) -> nn.Module:
    """A copy whose every module that has a class of ours is of that class."""
    module = copy.deepcopy(module)
    for child in module.modules():
        if type(child) in OURS:
            child.__class__ = OURS[type(child)]
    return module


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def sample_grid(grid: Mapping[str, Sequence], count: int, seed: int) -> list[dict]:
    """Random points, few of which still show every pair of values (see below)."""
    rng = random.Random(seed)
    return [{flag: rng.choice(values) for flag, values in grid.items()} for _ in range(count)]


def assert_every_pair(grid: Mapping[str, Sequence], cases: Sequence[dict]) -> None:
    seen = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
    for (f, fs), (g, gs) in itertools.combinations(grid.items(), 2):
        assert seen >= {((f, a), (g, b)) for a, b in itertools.product(fs, gs)}


@contextlib.contextmanager
def torch_slow_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def skip_unless_runs(on: str, *ops: str) -> None:
    """Skips a test that forces a backend on modules where it lacks one of their operations."""
    backend = on.split(":")[0]
    if contract.device_of(on) != "cpu":
        pytest.skip("the module's truth is on the CPU")
    for op in ops:
        kernel = TABLE[op].get(backend)
        if backend != "torch" and (kernel is None or kernel.forward is None):
            pytest.skip(f"{backend} has no {op}")


def without_dropout(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0
    return module


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o is not None)


def run(
    module: nn.Module, call: Callable[..., Any], inputs: Sequence[Tensor], grads: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of every parameter and input for fixed cotangents."""
    module.zero_grad(set_to_none=True)
    inputs = [x.detach().clone() for x in inputs]
    if not grads:
        with torch.no_grad():
            return list(as_tuple(call(module, *inputs))), {}
    inputs = [x.requires_grad_() for x in inputs]
    outs = as_tuple(call(module, *inputs))
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out.double() * weight.to(out.dtype)).sum()
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return list(outs), found


def widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def worst_relative_error(wants: Sequence[Tensor], peers: Sequence[Tensor]) -> float:
    """The peer's largest error as a fraction of the tensor's largest entry, over many tensors."""
    worst = 0.0
    for want, peer in zip(wants, peers):
        scale = want.abs().max().item() if want.numel() else 0.0
        if scale:
            worst = max(worst, (peer.double() - want).abs().max().item() / scale)
    return worst


def assert_close(
    out: Tensor, want: Tensor, peer: Tensor, what: str, steps: int, relative: float = 0.0
) -> None:
    if out.dtype == torch.float64:  # the truth itself rounds in float64
        torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-10)
        return
    found = compare_tensors(out, want, peer)
    if found.problem is None or not found.allowed:
        assert found.problem is None, f"{what}: {found.problem}"
        return
    step = found.allowed - 2 * found.peer_error
    peer_error = max(found.peer_error, relative * want.abs().max().item())
    assert found.error <= 2 * peer_error + steps * step, f"{what}: {found.problem}"


def assert_distribution(collected: list[tuple[float, float]]) -> None:
    """Median and upper tail of our relative errors are at most twice the peer's.

    Gradients of a whole layer are chaotic one by one: a row whose variance happens to be small
    magnifies what was rounded before it, in one run and not in the other.
    """
    ours, peer = torch.tensor(collected, dtype=torch.float64).unbind(1)
    for q in (0.5, 0.9, 0.97):
        assert ours.quantile(q) <= 2 * peer.quantile(q) + 1e-3, f"at quantile {q}"


def compare(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    grads: bool = True,
    training: bool = False,
    ours: nn.Module | None = None,
    steps: int = 4,
    collect: list[tuple[float, float]] | None = None,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """Holds ours against torch's ``module``: outputs, and with ``grads`` every gradient.

    ``options`` are keyword arguments of the call; floating masks are widened for the truth.
    ``steps=1`` is the contract as it stands. It compares two largest errors, which for a tensor of
    a few numbers (a bias's gradient) is a matter of luck; so hundreds of small cases use more
    steps, and the peer's worst relative error over all tensors of a case for each of them. With
    ``collect`` gradients aren't held one by one: their relative errors, ours and the peer's, are
    appended to it, for :func:`assert_distribution`, after a cap far below any wrong number.
    """
    ours = (ours or ours_of(module)).train(training)
    base = without_dropout(module).train()
    true = copy.deepcopy(base).double()
    call = call or (lambda m, *x, **kw: m(*x, **kw))
    got, got_grads = run(ours, lambda m, *x: call(m, *x, **options), inputs, grads)
    wide = {k: widened(v) for k, v in options.items()}
    with torch_slow_path():
        want, want_grads = run(
            true, lambda m, *x: call(m, *x, **wide), [x.double() for x in inputs], grads
        )
        narrow = {
            k: v.to(inputs[0].dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in options.items()
        }
        peer, peer_grads = run(base, lambda m, *x: call(m, *x, **narrow), inputs, grads)
    assert len(got) == len(want)
    for i, (a, b, c) in enumerate(zip(got, want, peer)):
        assert a.dtype == c.dtype, f"output {i} has dtype {a.dtype}, torch's {c.dtype}"
        assert_close(a, b, c, f"output {i}", steps)
    assert got_grads.keys() == want_grads.keys()
    relative = 0.0
    if steps > 1:
        names = list(want_grads)
        relative = worst_relative_error(
            [*want, *(want_grads[n] for n in names)], [*peer, *(peer_grads[n] for n in names)]
        )
    for name, gradient in got_grads.items():
        want_grad, peer_grad = want_grads[name], peer_grads[name]
        if collect is None:
            what = f"gradient of {name}"
            assert_close(gradient, want_grad, peer_grad, what, steps, relative)
            continue
        assert torch.equal(gradient.isnan(), want_grad.isnan())
        scale = want_grad.abs().max().clamp_min(1e-30)
        errors = [(g.double() - want_grad).abs().max() / scale for g in (gradient, peer_grad)]
        collect.append((errors[0].item(), errors[1].item()))
        cap = 10 * max(relative, torch.finfo(gradient.dtype).eps)  # a wrong number is far beyond
        assert errors[0] <= cap, f"gradient of {name}: relative error {errors[0]:.3g} > {cap:.3g}"
