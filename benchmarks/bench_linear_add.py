"""linear_add: projection + bias + residual, GELU or dropout, beside torch and oneDNN's packed
weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.benchmarks import peers
from fasttransformer.benchmarks._linear import linear_bytes, operands, shapes
from fasttransformer.benchmarks._shared import (
    OURS,
    Candidate,
    Case,
    candidates,
    run_under_pytest,
)


def _case(rows: int, inner: int, outer: int, dtype: torch.dtype, kind: str) -> Case:
    mode = "forward + backward" if kind == "forward + backward" else "forward"
    options: dict[str, Any] = {"gelu": {"activation": "gelu"}, "dropout": {"dropout_p": 0.1}}.get(
        kind, {}
    )

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return ft.linear_add(x, w, b, r, **options)

    def torchs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        y = F.linear(x, w, b)
        if kind == "gelu":
            y = F.gelu(y)
        return (F.dropout(y, 0.1) if kind == "dropout" else y) + r

    def wanted(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return reference.linear_add(x, w, b, r, **options)

    def make() -> dict[str, Candidate]:
        inputs = operands(rows, inner, outer, dtype, grad=mode != "forward")
        made = candidates({OURS: ours, "torch": torchs}, inputs, mode, wanted)
        if kind == "":
            made |= peers.present(oneDNN_packed=peers.packed_linear(*inputs))
        return made

    passes = 1 if mode == "forward" else 3
    return Case(
        "linear_add", f"{rows}×{inner}→{outer} {kind}".strip(), dtype, make,
        bytes=passes * linear_bytes(rows, inner, outer, dtype),
        flops=passes * 2 * rows * inner * outer, compared=kind != "dropout",
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, inner, outer, dtype in shapes(quick):
        kinds = ["", "forward + backward"] if rows > 16 else [""]
        if rows > 16 and not quick:
            kinds += ["gelu", "dropout"]
        found += [_case(rows, inner, outer, dtype, kind) for kind in kinds]
    return found


test_linear_add = run_under_pytest
