"""linear_cross_entropy: the loss, and with the gradients of input and weight, beside torch's pair,
torch's own fused form and the pair compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.benchmarks import peers as others
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    candidates,
    randn,
    run_under_pytest,
)

#: (rows, features, classes): vocabularies of small and large language models.
SHAPES = ((1024, 512, 8192), (2048, 512, 32000), (512, 512, 128256), (256, 512, 262144))
QUICK = ((1024, 256, 8192),)
DTYPES = (torch.float32, torch.bfloat16)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _pair(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _peers(compiled: bool) -> dict[str, Loss]:
    peers: dict[str, Loss] = {
        OURS: lambda x, weight, target: ft.linear_cross_entropy(x, weight, target),
        "torch": _pair,
    }
    fused = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on
    if fused is not None:
        peers["torch fused"] = fused
    if compiled and others.usable("torch.compile"):
        peers["torch.compile"] = others.compiled(_pair)
    return peers


def _wanted(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return reference.linear_cross_entropy(x, weight, target)


def _step(loss: Loss, x: Tensor, weight: Tensor, target: Tensor) -> Candidate:
    return lambda: torch.autograd.grad(loss(x, weight, target), (x, weight))


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, features, classes in QUICK if quick else SHAPES:
        for dtype in DTYPES:

            def inputs(
                size=(rows, features, classes), dtype=dtype, grad=False
            ) -> tuple[Tensor, Tensor, Tensor]:
                rows, features, classes = size
                x = randn(rows, features, dtype=dtype, requires_grad=grad)
                weight = (randn(classes, features) * 0.05).to(dtype).requires_grad_(grad)
                return x, weight, torch.arange(rows) * 7919 % classes

            def forward(inputs=inputs) -> Mapping[str, Candidate]:
                given = inputs()
                return candidates(_peers(not quick), given, "forward", _wanted)

            def train(inputs=inputs) -> Mapping[str, Candidate]:
                given = inputs(grad=True)
                return {name: _step(loss, *given) for name, loss in _peers(not quick).items()}

            name, flops = f"{rows}×{features}→{classes}", 2 * rows * features * classes
            op = "linear_cross_entropy"
            size = (rows + classes) * features * dtype.itemsize
            found.append(Case(op, name, dtype, forward, bytes=size, flops=flops))
            found.append(Case(op, f"{name} forward + backward", dtype, train, bytes=2 * size,
                              flops=3 * flops))  # fmt: skip
    return found


test_linear_cross_entropy = run_under_pytest
