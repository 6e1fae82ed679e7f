"""Every operation with a size of 0 in each of its dimensions, forward and backward, on every
backend: shapes and values are the reference's, and nothing dies or shows memory that nobody wrote.

A kernel that divides by a size of 0 ends its process. So each backend's cases run in a process of
their own (this file as a program), which writes a line of JSON before and after each case; where it
dies, another goes on after the case that killed it. New memory is filled with NaN there, so that
an output that a kernel forgot is seen.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as conftest.py does, before the import below

import pytest

import fasttransformer as ft
from contract import RUNNABLE, backends_of, running_on
from fasttransformer import reference
from fasttransformer._contract import compare_runs, outputs_and_gradients
from fasttransformer.backends import ALIASES, TABLE

#: What each name of a size stands for where it is not 0.
SIZES = {"B": 2, "H": 2, "G": 2, "S": 3, "T": 5, "D": 8, "E": 4, "N": 3, "C": 6, "F": 7, "K": 5,
         "V": 9, "P": 2, "M": 5}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``call(ops, sizes, *inputs)`` with inputs given as shapes of named sizes, ``"B,S,C V,C"``."""

    op: str
    name: str
    inputs: str
    call: Callable[..., Any]
    #: Sizes beside those of the inputs that are set to 0 too, and those that are never.
    others: str = ""
    fixed: str = ""
    #: Whether the operation refuses these sizes.
    refused: Callable[[dict[str, int]], bool] = lambda n: False
    sizes: dict[str, int] = field(default_factory=dict)
    reference_only: bool = False  # no kernel has this option

    def zeros(self) -> Iterator[tuple[str, ...]]:
        """Each size alone, and all; of attention, which has most, each two together as well."""
        names = [n for n in dict.fromkeys(self.inputs + self.others) if n.isalpha()]
        names = [n for n in names if n not in self.fixed]
        yield from ((name,) for name in names)
        if self.op == "attention":
            yield from itertools.combinations(names, 2)
        yield tuple(names)


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % max(high, 1)


def starts(length: int, sequences: int) -> torch.Tensor:
    """Where sequences of a packed batch begin, the first of them empty."""
    if sequences == 0:
        return torch.zeros(1, dtype=torch.int32)
    return torch.tensor([0] * min(sequences, 2) + [length] * max(sequences - 1, 1)).int()


def decoded(ops, n, query, key, value, **options):
    cache = ft.KVCache(
        key.detach()[None].clone(), value.detach()[None].clone(),
        torch.full((1, n["B"]), min(n["T"], 2), dtype=torch.int32),
    )  # fmt: skip
    with torch.no_grad():
        return ops.attention_decode(query.detach(), cache, return_lse=True, **options)


def loss_of(ops, n, x, *rest, reduction="mean", smoothing=0.0, kept=True):
    target = integers(n["K"], n["N"]) if kept and n["K"] else torch.full((n["N"],), -100)
    if not rest:
        return ops.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)
    weight, bias = rest
    return ops.linear_cross_entropy(
        x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=smoothing
    )


def fed(ops, n, x, w_in, b_in, w_out, b_out, activation):
    return ops.feed_forward(x, w_in, b_in, w_out, b_out, activation=activation)


def losses(op: str, inputs: str) -> list[Case]:
    found = []
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.2):
            call = functools.partial(loss_of, reduction=reduction, smoothing=smoothing)
            found.append(Case(op, f"{reduction}, smoothing {smoothing}", inputs, call))
    return found


def masked(shape: tuple[int, ...]) -> torch.Tensor:
    return integers(3, *shape) > 0


def no_keys_heads(n: dict[str, int]) -> bool:
    """Heads of the query share those of the keys, of which there are none."""
    return n["G"] == 0 and n["H"] > 0


HEADS = "B,H,S,D B,G,T,D B,G,T,E"
PACKED = "S,H,D T,G,D T,G,E"
CACHED = "B,H,S,D B,G,T,D B,G,T,E"
LINEAR = "B,S,C K,C K B,S,K"

CASES: tuple[Case, ...] = (
    Case("softmax", "plain", "B,S,T", lambda ops, n, x: ops.softmax(x)),
    Case("softmax", "middle", "B,S,T", lambda ops, n, x: ops.softmax(x, 1)),
    Case("softmax", "masked", "B,S,T", lambda ops, n, x: ops.softmax(
        x, mask=masked((n["S"], n["T"])), is_causal=True, scale=0.5)),
    Case("log_softmax", "plain", "B,S,T", lambda ops, n, x: ops.log_softmax(x)),
    Case("layer_norm", "affine", "N,C C C", lambda ops, n, x, w, b: ops.layer_norm(
        x, (n["C"],), w, b)),
    Case("layer_norm", "two dimensions", "N,S,C", lambda ops, n, x: ops.layer_norm(
        x, (n["S"], n["C"]))),
    Case("rms_norm", "affine", "N,C C", lambda ops, n, x, w: ops.rms_norm(x, (n["C"],), w)),
    Case("rms_norm", "plain", "B,N,C", lambda ops, n, x: ops.rms_norm(x, (n["C"],))),
    Case("add_layer_norm", "affine", "N,C N,C C C", lambda ops, n, x, r, w, b:
        ops.add_layer_norm(x, r, (n["C"],), w, b)),
    Case("add_rms_norm", "affine", "N,C N,C C", lambda ops, n, x, r, w: ops.add_rms_norm(
        x, r, (n["C"],), w)),
    Case("linear_add", "residual", LINEAR, lambda ops, n, *x: ops.linear_add(*x)),
    Case("linear_add", "gelu", LINEAR, lambda ops, n, *x: ops.linear_add(*x, activation="gelu")),
    Case("linear_add", "plain", "N,C K,C", lambda ops, n, *x: ops.linear_add(*x)),
    Case("linear_add", "heads", "B,H,S,D K,M", lambda ops, n, x, w: ops.linear_add(
        x, w[:, : n["H"] * n["D"]]), fixed="M", sizes={"M": 16}),
    Case("linear_add_layer_norm", "affine", LINEAR + " K K", lambda ops, n, *x:
        ops.linear_add_layer_norm(*x)),
    Case("linear_add_rms_norm", "affine", LINEAR + " K", lambda ops, n, *x:
        ops.linear_add_rms_norm(*x)),
    Case("linear_add_layer_norm", "normed alone", "N,C K,C", lambda ops, n, *x:
        ops.linear_add_layer_norm(*x, None, None, None, None, return_sum=False)),
    Case("linear_add_rms_norm", "normed alone", "N,C K,C", lambda ops, n, *x:
        ops.linear_add_rms_norm(*x, None, None, None, return_sum=False)),
    Case("feed_forward", "gelu", "N,C F,C F K,F K", functools.partial(fed, activation="gelu")),
    Case("feed_forward", "swiglu", "N,C M,C M K,F K", lambda ops, n, x, wi, bi, wo, bo: fed(
        ops, n, x, wi[: 2 * n["F"]], bi[: 2 * n["F"]], wo, bo, "swiglu"),
        fixed="M", sizes={"M": 14}),
    Case("attention", "plain", HEADS, lambda ops, n, *x: ops.attention(*x, return_lse=True),
        refused=no_keys_heads),
    Case("attention", "causal, bias, sinks", HEADS + " H,S,T H", lambda ops, n, q, k, v, bias, s:
        ops.attention(q, k, v, bias=bias, sinks=s, is_causal=True, return_lse=True),
        refused=no_keys_heads),
    Case("attention", "mask, window, lengths", HEADS, lambda ops, n, *x: ops.attention(
        *x, mask=masked((n["B"], 1, n["S"], n["T"])), window=(2, 1),
        key_lengths=torch.full((n["B"],), n["T"] // 2), softcap=5.0,
        alibi_slopes=torch.ones(n["H"])), refused=no_keys_heads),
    Case("attention", "bias of one column", HEADS + " B,S,P", lambda ops, n, q, k, v, bias:
        ops.attention(q, k, v, bias=bias[:, None], return_lse=True), fixed="P", sizes={"P": 1},
        refused=no_keys_heads),
    Case("scaled_dot_product_attention", "causal", "B,H,S,D B,H,T,D B,H,T,E", lambda ops, n, *x:
        ops.scaled_dot_product_attention(*x, is_causal=True)),
    Case("attention_varlen", "plain", PACKED, lambda ops, n, *x: ops.attention_varlen(
        *x, starts(n["S"], 2), starts(n["T"], 2), return_lse=True), refused=no_keys_heads),
    Case("attention_varlen", "causal, bias, sinks", PACKED + " H,S,T H",
        lambda ops, n, q, k, v, bias, sinks: ops.attention_varlen(
            q, k, v, starts(n["S"], 2), starts(n["T"], 2), bias=bias, sinks=sinks, is_causal=True,
            causal_alignment="bottom_right", return_lse=True), refused=no_keys_heads),
    Case("attention_varlen", "no sequences", "P,H,D P,G,D P,G,E", lambda ops, n, *x:
        ops.attention_varlen(*x, starts(0, 0), starts(0, 0), return_lse=True),
        fixed="P", sizes={"P": 0}, refused=no_keys_heads),
    Case("attention_decode", "plain", CACHED, decoded, refused=no_keys_heads),
    Case("attention_decode", "new tokens", CACHED + " B,G,N,D B,G,N,E",
        lambda ops, n, q, k, v, a, b: decoded(
            ops, n, q, k, v, new_key=a.detach(), new_value=b.detach()), fixed="T",
        refused=no_keys_heads),
    Case("merge_attention", "stacked", "P,B,H,S,E P,B,H,S", lambda ops, n, outs, lses:
        ops.merge_attention(outs, lses.to(torch.promote_types(outs.dtype, torch.float32))),
        refused=lambda n: n["P"] == 0),
    *losses("cross_entropy", "N,K"),
    *losses("linear_cross_entropy", "N,C K,C K"),
    Case("linear_cross_entropy", "all left out", "N,C K,C K", functools.partial(
        loss_of, reduction="sum", kept=False)),
    Case("cross_entropy", "probabilities", "N,K", lambda ops, n, x: ops.cross_entropy(
        x, torch.full((n["N"], n["K"]), 0.2, dtype=x.dtype), label_smoothing=0.1),
        reference_only=True),
    Case("cross_entropy", "three dimensions", "N,K,S", lambda ops, n, x: ops.cross_entropy(
        x, integers(n["K"], n["N"], n["S"]) if n["K"] else torch.full((n["N"], n["S"]), -100))),
    Case("linear_softmax", "bias", "N,C K,C K", lambda ops, n, *x: ops.linear_softmax(*x)),
    Case("linear_topk", "bias", "N,C K,C K", lambda ops, n, *x: ops.linear_topk(
        *x, k=min(2, n["K"]))[0]),
    Case("embedding", "token", "V,C", lambda ops, n, w: ops.embedding(
        integers(n["V"], n["B"], n["S"] if n["V"] else 0), w), others="BS"),
    Case("embedding", "position, sinusoidal", "V,C T,C", lambda ops, n, w, p: ops.embedding(
        integers(n["V"], n["B"], n["S"] if n["V"] and n["T"] else 0), w, position_weight=p,
        sinusoidal=True, padding_idx=None), others="BS"),
    Case("rotary_embedding", "plain", "B,H,S,D B,G,S,D", lambda ops, n, q, k:
        ops.rotary_embedding(q, k, *torch.ones(2, n["S"], n["D"] // 2))),
)  # fmt: skip
OPERATIONS = (*TABLE, *ALIASES)
FORWARD_ONLY = {"attention_decode", "linear_topk"}  # of all backends but the reference
BY_OP = {op: [case for case in CASES if case.op == op] for op in OPERATIONS}


# ---- one process per backend --------------------------------------------------------------------


def problem_of(case: Case, zeros: tuple[str, ...], dtype: torch.dtype, on: str) -> str | None:
    """What is wrong with a case on a backend, or None."""
    n = {**SIZES, **case.sizes, **dict.fromkeys(zeros, 0)}
    shapes = [tuple(n[name] for name in shape.split(",")) for shape in case.inputs.split()]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    if case.refused(n):
        try:
            with running_on(on, launched=None):
                case.call(ft, n, *inputs)
        except ValueError:
            return None
        return "arguments that mean nothing are not refused"
    run = functools.partial(outputs_and_gradients, grads=case.op not in FORWARD_ONLY)
    with running_on(on, launched=None):
        ours = run(functools.partial(case.call, ft, n), inputs)
    theirs = functools.partial(case.call, reference, n)
    found = compare_runs(ours, run(theirs, inputs, dtype=torch.float64), run(theirs, inputs))
    # Of a few numbers the ratio of two errors is luck, and no matter here.
    wrong = [f"{name}: {c.problem}" for name, c in found.items()
             if c.problem is not None and not 0 < c.error <= 4 * c.allowed]  # fmt: skip
    return "; ".join(wrong) or None


def every_case(on: str) -> Iterator[tuple[Case, tuple[str, ...], torch.dtype]]:
    for op in OPERATIONS:
        if on not in backends_of(ALIASES.get(op, op)):
            continue
        for case in BY_OP[op]:
            if case.reference_only and on != "torch":
                continue
            for zeros in case.zeros():
                for dtype in (torch.float32, torch.bfloat16):
                    yield case, zeros, dtype


def main(on: str, begin: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    for index, (case, zeros, dtype) in enumerate(every_case(on)):
        if index < begin:
            continue
        name = f"{case.op} ({case.name}), {' '.join(zeros)} 0, {str(dtype)[6:]}"
        print(json.dumps({"begins": index, "case": name}), flush=True)
        torch.manual_seed(index)
        try:
            problem = problem_of(case, zeros, dtype, on)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps({"ends": index, "op": case.op, "problem": problem}), flush=True)
    print(json.dumps({"done": True}), flush=True)


@functools.cache
def found_on(on: str) -> tuple[dict[str, int], dict[str, list[str]]]:
    """(operation → its cases that ran, operation → what was wrong) on a backend."""
    ran: dict[str, int] = {}
    wrong: dict[str, list[str]] = {}
    begin, deaths = 0, 0
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    while deaths < 50:
        run = subprocess.run(
            [sys.executable, __file__, on, str(begin)],
            cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        names = {line["begins"]: line["case"] for line in lines if "begins" in line}
        for line in lines:
            if "ends" in line:
                ran[line["op"]] = ran.get(line["op"], 0) + 1
                if line["problem"] is not None:
                    wrong.setdefault(line["op"], []).append(
                        f"{names[line['ends']]}: {line['problem']}"
                    )
        if lines and "done" in lines[-1]:
            return ran, wrong
        assert lines and "begins" in lines[-1], f"{on}: {run.stderr[-2000:]}"
        last = lines[-1]
        wrong.setdefault(last["case"].partition(" ")[0], []).append(
            f"{last['case']}: the process died ({run.returncode})"
        )
        begin, deaths = last["begins"] + 1, deaths + 1
    return ran, wrong


BETWEEN = [str(on) for on in RUNNABLE if on.startswith("cpu:")][1:-1]


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_a_case(op):
    assert BY_OP[op], f"{op}: no case in CASES of {Path(__file__).name}"


@pytest.mark.parametrize("on", [str(on) for on in RUNNABLE])
@pytest.mark.parametrize("op", OPERATIONS)
def test_b80_b86_sizes_of_zero(on, op, request):
    """pytorch/pytorch#141229 and #77895: a size of 0 ends the process, or gives what nobody
    wrote."""
    if on in BETWEEN and not request.config.getoption("--all"):
        pytest.skip("the sets between the lowest and the best: with --all")
    if on not in backends_of(ALIASES.get(op, op)):
        pytest.skip("no kernel")
    ran, wrong = found_on(on)
    assert op not in wrong, "\n".join(wrong[op])
    assert ran[op] >= len(BY_OP[op])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
