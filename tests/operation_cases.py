"""Every operation with each of its tensor arguments, in one table: what tests of layouts, and
others that walk all operations, run.

A case names its arguments by path (``query``, ``outs[0]``, ``cache.keys``) and gives their shapes
in symbols, so that a test can run it at other sizes. ``missing()`` says which tensor arguments of
the package's functions stand in no case.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft
from contract import On, backends_of
from fasttransformer.backends import ALIASES, TABLE


@dataclass(frozen=True)
class Argument:
    """A tensor argument. Symbols in ``shape`` are names of sizes, numbers, or their products.

    kind: "float" (random numbers), "bool", "ids" (integers below ``below``), "bounds" (boundaries
    that end at ``below``), "lengths" (up to ``below``), "probabilities" (rows that sum to one).
    """

    shape: str
    kind: str = "float"
    below: str = ""
    #: True, False, or "reference" where no kernel has its gradient.
    grad: bool | str = True
    #: May have any floating-point dtype next to the others'.
    any_float: bool = False
    #: The operation writes to it.
    written: bool = False

    def sizes(self, n: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(evaluated(token, n) for token in self.shape.split())

    def make(self, n: Mapping[str, int], generator: torch.Generator) -> Tensor:
        sizes = self.sizes(n)
        if self.kind == "float":
            return torch.randn(sizes, generator=generator)
        if self.kind == "bool":
            return torch.rand(sizes, generator=generator) < 0.7
        if self.kind == "probabilities":
            return torch.randn(sizes, generator=generator).softmax(-1)
        below = evaluated(self.below, n)
        if self.kind == "bounds":
            steps = torch.arange(sizes[0], dtype=torch.float64)
            return (steps * below / max(1, sizes[0] - 1)).round().long()
        high = below + 1 if self.kind == "lengths" else below
        drawn = torch.randint(0, high, sizes, generator=generator)
        return drawn.int() if self.kind == "lengths" else drawn


def evaluated(token: str, n: Mapping[str, int]) -> int:
    return math.prod(int(part) if part.isdigit() else n[part] for part in token.split("*"))


def floats(shape: str, **how: Any) -> Argument:
    return Argument(shape, **how)


def vector(shape: str) -> Argument:
    """Any floating-point dtype, like a norm's weight or attention's bias."""
    return Argument(shape, any_float=True)


def constant(shape: str) -> Argument:
    """Any floating-point dtype, and only the reference has its gradient."""
    return Argument(shape, any_float=True, grad="reference")


def ids(shape: str, below: str) -> Argument:
    return Argument(shape, "ids", below, grad=False)


def bools(shape: str) -> Argument:
    return Argument(shape, "bool", grad=False)


@dataclass(frozen=True)
class Case:
    """One call of an operation, with numbers for the symbols of its shapes."""

    op: str
    name: str
    n: dict[str, int]
    arguments: dict[str, Argument]
    #: What else the call gets, by the sizes.
    options: Callable[[Mapping[str, int]], dict[str, Any]] = lambda n: {}
    #: Sizes that can't be 1.
    fixed: str = ""
    #: A size → those that are 1 when it is.
    bound: dict[str, str] = field(default_factory=dict)
    #: False where no kernel does the case: it runs on the reference.
    kernels: bool = True

    @property
    def id(self) -> str:
        return f"{self.op}: {self.name}"

    def sizes(self, *ones: str) -> dict[str, int]:
        n = dict(self.n)
        for name in ones:
            n[name] = 1
            n.update((other, 1) for other in self.bound.get(name, "").split())
        return n

    def can_be_one(self) -> list[str]:
        return [name for name in self.n if name not in self.fixed.split()]

    def all_equal(self, size: int = 4) -> dict[str, int]:
        """Sizes at which as many arguments as can be have the same shape."""
        return {name: n if name in self.fixed.split() else size for name, n in self.n.items()}

    def backends(self) -> list[On]:
        """Where it runs, each of which a test can be held to."""
        found = backends_of(ALIASES.get(self.op, self.op))
        return [on for on in found if self.kernels or on == "torch"]

    def tensors(
        self, n: Mapping[str, int], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Fresh contiguous tensors, the same ones in every call."""
        made = {}
        for i, (path, argument) in enumerate(self.arguments.items()):
            x = argument.make(n, torch.Generator().manual_seed(11 + i))
            made[path] = self._cast(path, x, dtype)
        return made

    def _cast(self, path: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not x.is_floating_point():
            return x
        wide = self.op == "merge_attention" and path.startswith("lses")
        return x.to(torch.promote_types(dtype, torch.float32) if wide else dtype)

    def call(self, tensors: Mapping[str, Tensor], n: Mapping[str, int]) -> list[Tensor]:
        """The outputs, and what was written to. Dropout's seed is the same in every call."""
        torch.manual_seed(5)
        out = getattr(ft, self.op)(**assembled(tensors), **self.options(n))
        written = [x for path, x in tensors.items() if self.arguments[path].written]
        return [*(out if isinstance(out, tuple) else (out,)), *written]

    def wants_grad(self, path: str, on: str) -> bool:
        grad = self.arguments[path].grad
        return grad is True or (grad == "reference" and on == "torch")


def assembled(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments by name, from tensors by path."""
    given: dict[str, Any] = {}
    fields: dict[str, Tensor] = {}
    for path, x in tensors.items():
        if path.startswith("cache."):
            fields[path.removeprefix("cache.")] = x
        elif path.endswith("]"):
            given.setdefault(path.partition("[")[0], []).append(x)
        else:
            given[path] = x
    if fields:
        given["cache"] = ft.KVCache(**fields)
    return given


# Sizes differ from one another, so that a stride taken for another shows.
ROWS = {"B": 2, "S": 3, "K": 11, "N": 7}
LINEAR = {"input": floats("B S K"), "weight": floats("N K"), "bias": floats("N")}
RESIDUAL = {**LINEAR, "residual": floats("B S N")}
HEADS = {"B": 2, "H": 3, "S": 4, "E": 5, "N": 7}
JOINED = {"input": floats("B H S E"), "weight": floats("N H*E"), "bias": floats("N"),
          "residual": floats("B S N")}  # fmt: skip
NORM = {"norm_weight": vector("N"), "norm_bias": vector("N")}
RMS = {"norm_weight": vector("N")}
BLOCK = {"input": floats("B S K"), "weight_in": floats("M K"), "bias_in": floats("M"),
         "weight_out": floats("N M"), "bias_out": floats("N")}  # fmt: skip
GATED = {**BLOCK, "weight_in": floats("2*M K"), "bias_in": floats("2*M")}
WIDTHS = {**ROWS, "M": 9}
SCORES = {"B": 2, "H": 4, "G": 2, "S": 5, "T": 6, "D": 8, "E": 3}
QKV = {"query": floats("B H S D"), "key": floats("B G T D"), "value": floats("B G T E")}
GROUPS = {"H": "G"}
PACKED = {"Q": 9, "T": 8, "H": 4, "G": 2, "D": 8, "E": 3, "X": 4}
PACKED_QKV = {"query": floats("Q H D"), "key": floats("T G D"), "value": floats("T G E"),
              "cu_seqlens_q": Argument("X", "bounds", "Q", grad=False),
              "cu_seqlens_k": Argument("X", "bounds", "T", grad=False)}  # fmt: skip
OPTIONS = {"alibi_slopes": constant("H"), "sinks": vector("H")}
CACHE = {"L": 2, "B": 2, "H": 4, "G": 2, "S": 2, "C": 9, "R": 3, "E": 5}
CACHED = {
    "query": floats("B H S 2*R", grad="reference"),
    "cache.keys": Argument("L B G C 2*R", grad=False, written=True),
    "cache.values": Argument("L B G C E", grad=False, written=True),
    "cache.lengths": Argument("L B", "lengths", "5", grad=False, written=True),
    "new_key": floats("B G S 2*R", grad=False),
    "new_value": floats("B G S E", grad=False),
}
CLASSES = {"B": 5, "C": 7, "K": 6, "U": 3}


def _features(*names: str) -> Callable[[Mapping[str, int]], dict[str, Any]]:
    return lambda n: {"normalized_shape": tuple(n[name] for name in names)}


def _given(**options: Any) -> Callable[[Mapping[str, int]], dict[str, Any]]:
    return lambda n: options


CASES: tuple[Case, ...] = (
    Case("softmax", "mask", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "mask": bools("S C")}),
    Case("softmax", "inner dimension", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "mask": bools("B 1 C")}, _given(dim=1)),
    Case("log_softmax", "mask", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "mask": bools("B S C")}, _given(scale=0.5)),
    Case("layer_norm", "last dimension", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "weight": vector("C"), "bias": vector("C")}, _features("C")),
    Case("layer_norm", "two dimensions", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "weight": vector("S C"), "bias": vector("S C")},
         _features("S", "C")),
    Case("rms_norm", "last dimension", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "weight": vector("C")}, _features("C")),
    Case("add_layer_norm", "last dimension", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "residual": floats("B S C"), "weight": vector("C"),
          "bias": vector("C")}, _features("C")),
    Case("add_rms_norm", "dropout", {"B": 2, "S": 3, "C": 9},
         {"input": floats("B S C"), "residual": floats("B S C"), "weight": vector("C")},
         lambda n: {**_features("C")(n), "dropout_p": 0.3}),
    Case("linear_add", "residual", ROWS, RESIDUAL),
    Case("linear_add", "rows, gelu", ROWS, {**LINEAR, "input": floats("S K")},
         _given(activation="gelu")),
    Case("linear_add", "dropout, broadcast residual", ROWS, {**RESIDUAL, "residual": floats("S 1")},
         _given(dropout_p=0.3)),
    Case("linear_add", "relu, dropout, residual", ROWS, RESIDUAL,
         _given(activation="relu", dropout_p=0.3)),
    Case("linear_add", "heads", HEADS, JOINED),
    Case("linear_add_layer_norm", "residual", ROWS, {**RESIDUAL, **NORM}),
    Case("linear_add_layer_norm", "heads", HEADS, {**JOINED, **NORM}),
    Case("linear_add_rms_norm", "residual", ROWS, {**RESIDUAL, **RMS}, _given(return_sum=False)),
    Case("linear_add_rms_norm", "heads", HEADS, {**JOINED, **RMS}),
    Case("feed_forward", "gelu", WIDTHS, BLOCK),
    Case("feed_forward", "swiglu, dropout", WIDTHS, GATED,
         _given(activation="swiglu", dropout_p=0.3)),
    Case("attention", "plain", SCORES, QKV, bound=GROUPS),
    Case("attention", "mask, lengths", SCORES,
         {**QKV, "mask": bools("B 1 S T"),
          "key_lengths": Argument("B", "lengths", "T", grad=False)},
         _given(is_causal=True, return_lse=True), bound=GROUPS),
    Case("attention", "bias, slopes, sinks", SCORES,
         {**QKV, "bias": vector("H S T"), **OPTIONS}, _given(return_lse=True), bound=GROUPS),
    Case("attention", "bias of one head", SCORES,
         {**QKV, "bias": vector("B 1 1 T"), "alibi_slopes": constant("B H")}, bound=GROUPS),
    Case("scaled_dot_product_attention", "bool mask", {**SCORES, "G": 4},
         {**QKV, "attn_mask": bools("S T")}, bound={"H": "G", "G": "H"}),
    Case("scaled_dot_product_attention", "three dimensions, float mask", SCORES,
         {"query": floats("B S D"), "key": floats("B T D"), "value": floats("B T E"),
          "attn_mask": vector("B S T")}),
    Case("attention_varlen", "causal", PACKED, PACKED_QKV,
         _given(is_causal=True, return_lse=True), fixed="X", bound=GROUPS),
    Case("attention_varlen", "mask, bias, slopes, sinks", PACKED,
         {**PACKED_QKV, "mask": bools("H 3 3"), "bias": vector("3 1 3 3"), **OPTIONS},
         _given(max_seqlen_q=3, max_seqlen_k=3), fixed="X Q T", bound=GROUPS),
    Case("attention_decode", "append, mask, bias", CACHE,
         {**CACHED, "mask": bools("B 1 S C"), "bias": constant("H S C"),
          "alibi_slopes": constant("H"), "sinks": constant("H")},
         _given(layer=0, return_lse=True), fixed="C", bound=GROUPS),
    Case("attention_decode", "rotary", CACHE,
         {**CACHED, "rotary[0]": constant("C R"), "rotary[1]": constant("C R")}, fixed="C",
         bound=GROUPS),
    Case("merge_attention", "list", {"B": 2, "H": 3, "S": 4, "E": 5},
         {"outs[0]": floats("B H S E"), "outs[1]": floats("B H S E"), "lses[0]": floats("B H S"),
          "lses[1]": floats("B H S")}),
    Case("merge_attention", "stacked", {"P": 3, "B": 2, "S": 4, "E": 5},
         {"outs": floats("P B S E"), "lses": floats("P B S")}),
    Case("cross_entropy", "classes", CLASSES,
         {"input": floats("B C"), "target": ids("B", "C"), "weight": constant("C")},
         _given(label_smoothing=0.1)),
    Case("cross_entropy", "more dimensions", CLASSES,
         {"input": floats("B C U"), "target": ids("B U", "C")}, _given(reduction="none")),
    Case("cross_entropy", "probabilities", CLASSES,
         {"input": floats("B C"),
          "target": Argument("B C", "probabilities", any_float=True)}, kernels=False),
    Case("linear_cross_entropy", "mean", CLASSES,
         {"input": floats("B K"), "linear_weight": floats("C K"), "target": ids("B", "C"),
          "linear_bias": floats("C"), "weight": constant("C")}),
    Case("linear_cross_entropy", "losses, more dimensions", CLASSES,
         {"input": floats("B K"), "linear_weight": floats("C U K"), "target": ids("B U", "C"),
          "linear_bias": floats("C U")}, _given(reduction="none"), kernels=False),
    Case("linear_softmax", "temperature", CLASSES,
         {"input": floats("B K"), "weight": floats("C K"), "bias": floats("C")},
         _given(temperature=0.7)),
    Case("linear_topk", "k = 1", CLASSES,
         {"input": floats("B K", grad="reference"), "weight": floats("C K", grad="reference"),
          "bias": floats("C", grad="reference")}, _given(k=1)),
    Case("embedding", "learned positions", {"B": 2, "S": 3, "V": 8, "C": 6, "P": 5},
         {"input": ids("B S", "V"), "weight": floats("V C"), "positions": ids("S", "P"),
          "position_weight": floats("P C")}, _given(scale=2.0)),
    Case("embedding", "sinusoidal", {"B": 2, "S": 3, "V": 8, "C": 6},
         {"input": ids("B S", "V"), "weight": floats("V C")}, _given(sinusoidal=True)),
    Case("rotary_embedding", "positions", {"B": 2, "H": 4, "G": 3, "S": 3, "R": 4, "P": 6},
         {"query": floats("B H S 2*R"), "key": floats("B G S 2*R"), "cos": constant("P R"),
          "sin": constant("P R"), "position_ids": ids("B S", "P")}),
    Case("rotary_embedding", "tables of each sample", {"B": 2, "H": 4, "S": 3, "R": 4},
         {"query": floats("B H S 2*R"), "key": floats("B H S 2*R"), "cos": constant("B S 2*R"),
          "sin": constant("B S 2*R")}),
)  # fmt: skip


def missing() -> list[str]:
    """Tensor arguments of the package's operations that stand in no case."""
    covered = {(c.op, re.split(r"[.\[]", path)[0]) for c in CASES for path in c.arguments}
    return [f"{op}({name})" for op, name in _tensor_arguments() if (op, name) not in covered]


def _tensor_arguments() -> Iterator[tuple[str, str]]:
    for op in (*TABLE, *ALIASES):
        for name, parameter in inspect.signature(getattr(ft, op)).parameters.items():
            if "Tensor" in str(parameter.annotation) or parameter.annotation == "KVCache":
                yield op, name
