"""What the tests of ft.nn share: a module of torch's, ours with the same parameters, the truth.

The truth is torch's module in float64 on the path it trains on (its evaluation path is wrong in
places: known faults b34, b42), with dropout off. The peer is the same in the module's own dtype.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import contract
import fasttransformer as ft
from fasttransformer._contract import Comparison
from fasttransformer._contract import compare as compare_tensors
from fasttransformer._runs import copy_of
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
    module = copy_of(module)
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
    for op in ops:
        kernel = TABLE[op].get(backend)
        if backend != "torch" and (kernel is None or kernel.forward is None):
            pytest.skip(f"{backend} has no {op}")


def without_dropout(module: nn.Module) -> nn.Module:
    module = copy_of(module)
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


def compared(
    runs: Sequence[tuple[list[Tensor], dict[str, Tensor]]],
) -> Iterator[tuple[str, Comparison]]:
    """Every output and gradient of (ours, truth, peer) under the number contract."""
    (got, got_grads), (want, want_grads), (peer, peer_grads) = runs
    assert len(got) == len(want)
    assert got_grads.keys() == want_grads.keys()
    triples = {f"output {i}": t for i, t in enumerate(zip(got, want, peer))}
    triples |= {f"gradient of {n}": (got_grads[n], want_grads[n], peer_grads[n]) for n in got_grads}
    for name, (a, b, c) in triples.items():
        assert a.dtype == c.dtype, f"{name} has dtype {a.dtype}, torch's {c.dtype}"
        if a.dtype == torch.float64:  # the truth itself rounds in float64
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
            continue
        yield name, compare_tensors(a, b, c)


def assert_no_worse(ratios: Sequence[float]) -> None:
    """Over hundreds of tensors luck is gone: the geometric mean of the ratio of the errors.

    Measured 0.91 to 1.01 over the grids in float32, 0.7 to 0.9 in 16 bits.
    """
    assert math.exp(math.fsum(ratios) / len(ratios)) < 1.15


def shuffle(models: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Another point of the same kind: each weight's entries shuffled, alike in each model."""

    def shuffled(x: Tensor) -> Tensor:
        return x.detach().flatten()[torch.randperm(x.numel())].view(x.shape)

    with torch.no_grad():
        for first, *others in zip(*(m.parameters() for m in models), strict=True):
            first.copy_(shuffled(first))
            for other in others:
                other.copy_(first)
    return [shuffled(x) for x in inputs]


def compare(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    grads: bool = True,
    training: bool = False,
    ours: nn.Module | None = None,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> list[float]:
    """Holds ours to the number contract: outputs, and with ``grads`` every gradient.

    The truth and the peer are torch's ``module``; ``options`` are keyword arguments of the call,
    floating masks widened for the truth. The contract compares two largest errors. Of a tensor of
    a few numbers, or of many that all hang on one ill-conditioned row, the ratio of two single
    errors is luck: one in a hundred float32 gradients here breaks it, ours or torch's own against
    torch's own in another order. What breaks it is held to it by the mean over new points
    (:func:`contract.assert_fair`).

    Returns the logarithms of our errors over the peer's, for :func:`assert_no_worse`.
    """
    ours = (ours or ours_of(module)).train(training)
    given = [p.detach().clone() for p in ours.parameters()]
    peer = without_dropout(module).train()
    true = copy_of(peer).double()
    call = call or (lambda m, *x, **kw: m(*x, **kw))
    wide = {k: widened(v) for k, v in options.items()}
    dtype = inputs[0].dtype
    narrow = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }

    drawn = None

    def draw() -> dict[str, Comparison]:
        nonlocal drawn
        drawn = inputs if drawn is None else shuffle([peer, ours, true], drawn)
        runs = [run(ours, lambda m, *x: call(m, *x, **options), drawn, grads)]
        with torch_slow_path():
            doubles = [x.double() for x in drawn]
            runs.append(run(true, lambda m, *x: call(m, *x, **wide), doubles, grads))
            runs.append(run(peer, lambda m, *x: call(m, *x, **narrow), drawn, grads))
        return dict(compared(runs))

    try:
        first = contract.assert_fair(draw)
    finally:
        with torch.no_grad():
            for parameter, before in zip(ours.parameters(), given, strict=True):
                parameter.copy_(before)
    ratios = []
    for found in first.values():
        grain = (found.allowed - 2 * found.peer_error) / 4  # nothing is finer, not even luck
        if grain:
            ratios.append(math.log((found.error + grain) / (found.peer_error + grain)))
    return ratios
