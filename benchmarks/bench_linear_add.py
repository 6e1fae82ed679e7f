"""linear_add: projection + bias + residual, or GELU, beside torch and oneDNN's packed weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer.benchmarks._linear import operands, shapes
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    forward_backward_of,
    run_under_pytest,
)


def _packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> Candidate:
    """oneDNN with the weight packed beforehand and the residual fused: torch's fastest path."""
    packed = weight.to_mkldnn()
    call = torch.ops.mkldnn._linear_pointwise.binary
    return lambda: call(x, residual, packed, bias, "add")


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, inner, outer, dtype in shapes(quick):
        size = (rows, inner, outer, dtype)

        def forward(size=size) -> Mapping[str, Candidate]:
            x, weight, bias, residual = operands(*size)
            candidates: dict[str, Candidate] = {
                OURS: lambda: ft.linear_add(x, weight, bias, residual),
                "torch": lambda: F.linear(x, weight, bias) + residual,
            }
            if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
                candidates["oneDNN packed"] = _packed(x, weight, bias, residual)
            return candidates

        def gelu(size=size) -> Mapping[str, Candidate]:
            x, weight, bias, _ = operands(*size)
            return {
                OURS: lambda: ft.linear_add(x, weight, bias, activation="gelu"),
                "torch": lambda: F.gelu(F.linear(x, weight, bias)),
            }

        def train(size=size) -> Mapping[str, Candidate]:
            inputs = operands(*size, grad=True)
            return {
                OURS: forward_backward_of(ft.linear_add, *inputs),
                "torch": forward_backward_of(lambda x, w, b, r: F.linear(x, w, b) + r, *inputs),
            }

        name, flops = f"{rows}×{inner}→{outer}", 2 * rows * inner * outer
        found.append(Case("linear_add", name, dtype, forward, flops=flops))
        if rows > 16:
            found.append(
                Case("linear_add", f"{name} forward + backward", dtype, train, flops=3 * flops)
            )
            if not quick:
                found.append(Case("linear_add", f"{name} gelu", dtype, gelu, flops=flops))
    return found


test_linear_add = run_under_pytest
