"""What the norms' tests share: one list of operations, run over sizes, dtypes and backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows enough that the largest error of the peer is no stroke of luck.
SIZES = [(9, 1), (60, 4), (40, 7), (30, 16), (26, 33), (71, 65), (131, 129), (9, 1024), (5, 5000)]
SMALL = [(16, 7), (9, 33)]  # for Triton's interpreter


@dataclass(frozen=True)
class Norm:
    """An operation with and without its options, as functions of tensors alone."""

    op: str
    adds: bool
    has_bias: bool

    def inputs(self, shape: tuple[int, ...], normalized: int, dtype: torch.dtype) -> list[Tensor]:
        vector = shape[-normalized:]
        first = [torch.randn(shape) * 2 + 0.5 for _ in range(2 if self.adds else 1)]
        vectors = [torch.randn(vector) for _ in range(2 if self.has_bias else 1)]
        return [t.to(dtype) for t in first + vectors]

    def of(self, module: Any, normalized: int = 1, **options: Any) -> Callable[..., Any]:
        function = getattr(module, self.op)

        def call(*tensors: Tensor | None) -> Any:
            count = 2 if self.adds else 1
            first, vectors = tensors[:count], tensors[count:]
            shape = first[0].shape[-normalized:]  # type: ignore[union-attr]
            return function(*first, shape, *vectors, **options)

        return call

    def ours(self, normalized: int = 1, **options: Any) -> Callable[..., Any]:
        return self.of(ft, normalized, **options)

    def reference(self, normalized: int = 1, **options: Any) -> Callable[..., Any]:
        return self.of(reference, normalized, **options)


LAYER_NORM = Norm("layer_norm", False, True)
RMS_NORM = Norm("rms_norm", False, False)
ADD_LAYER_NORM = Norm("add_layer_norm", True, True)
ADD_RMS_NORM = Norm("add_rms_norm", True, False)


def sizes_of(on: str) -> list[tuple[int, int]]:
    return SMALL if on == "triton" else SIZES


def first(out: Any) -> Tensor:
    """The normed output."""
    return out[0] if isinstance(out, tuple) else out
