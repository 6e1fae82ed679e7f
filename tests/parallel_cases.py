"""A case of every operation that is large enough for several threads, on the CPU.

As a program it computes all of them in this process with four threads, and then, after a fork, in a
child: ``python tests/parallel_cases.py``. It prints an operation's name before the child starts
with it, and "same" where results and gradients have the parent's bits.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer.backends import TABLE

Case = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]


def _ids(*shape: int, high: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, 100, 400, 600], dtype=torch.int32)
    return ft.attention_varlen(q, k, v, cu, cu)


def _decoded(q: Tensor) -> Tensor:
    keys = torch.randn(1, 4, 2, 650, 32, generator=torch.Generator().manual_seed(4))
    lengths = torch.full((1, 4), 650, dtype=torch.int32)
    return ft.attention_decode(q, ft.KVCache(keys, keys.flip(-1), lengths))


def _merged(outs: Tensor, lses: Tensor) -> Tensor:
    return ft.merge_attention(list(outs), list(lses))[0]


def _rotated(q: Tensor, k: Tensor) -> Tensor:
    angle = torch.outer(torch.arange(300.0), 0.5 ** torch.arange(16.0))
    return torch.cat(ft.rotary_embedding(q, k, angle.cos(), angle.sin()), 1)


#: operation → (call, shapes of the tensors that are differentiated)
CASES: dict[str, Case] = {
    "softmax": (ft.softmax, ((700, 500),)),
    "layer_norm": (lambda x, w, b: ft.layer_norm(x, (500,), w, b), ((700, 500), (500,), (500,))),
    "rms_norm": (lambda x, w: ft.rms_norm(x, (500,), w), ((700, 500), (500,))),
    "add_layer_norm": (
        lambda x, r, w, b: torch.cat(ft.add_layer_norm(x, r, (500,), w, b)),
        ((700, 500), (700, 500), (500,), (500,)),
    ),
    "add_rms_norm": (
        lambda x, r, w: torch.cat(ft.add_rms_norm(x, r, (500,), w)),
        ((700, 500), (700, 500), (500,)),
    ),
    "linear_add": (
        lambda x, w, b, r: ft.linear_add(x, w, b, r, activation="gelu"),
        ((600, 256), (300, 256), (300,), (600, 300)),
    ),
    "linear_add_layer_norm": (
        lambda *given: torch.cat(ft.linear_add_layer_norm(*given)),
        ((600, 256), (300, 256), (300,), (600, 300), (300,), (300,)),
    ),
    "linear_add_rms_norm": (
        lambda *given: torch.cat(ft.linear_add_rms_norm(*given)),
        ((600, 256), (300, 256), (300,), (600, 300), (300,)),
    ),
    "feed_forward": (
        lambda x, w, b, v, c: ft.feed_forward(x, w, b, v, c, activation="swiglu"),
        ((600, 128), (512, 128), (512,), (128, 256), (128,)),
    ),
    "attention": (
        lambda q, k, v: ft.attention(q, k, v, is_causal=True),
        ((2, 4, 300, 32), (2, 2, 300, 32), (2, 2, 300, 32)),
    ),
    "attention_varlen": (_packed, ((600, 4, 32),) * 3),
    "attention_decode": (_decoded, ((4, 4, 1, 32),)),
    "merge_attention": (_merged, ((3, 2, 4, 300, 32), (3, 2, 4, 300))),
    "cross_entropy": (lambda x: ft.cross_entropy(x, _ids(600, high=900)), ((600, 900),)),
    "linear_cross_entropy": (
        lambda x, w: ft.linear_cross_entropy(x, w, _ids(600, high=900)),
        ((600, 128), (900, 128)),
    ),
    "linear_softmax": (ft.linear_softmax, ((600, 128), (900, 128), (900,))),
    "linear_topk": (lambda x, w: ft.linear_topk(x, w, k=8)[0], ((600, 128), (9000, 128))),
    "embedding": (lambda w: ft.embedding(_ids(4, 500, high=900), w), ((900, 128),)),
    "rotary_embedding": (_rotated, ((2, 4, 300, 32), (2, 4, 300, 32))),
}
assert CASES.keys() == TABLE.keys(), CASES.keys() ^ TABLE.keys()


def inputs_of(op: str) -> list[Tensor]:
    """Of the CPU kernels' dtype; the first one transposed in memory, which fronts may copy."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(shape, generator=generator) for shape in CASES[op][1]]
    if op not in ("attention_decode", "merge_attention"):
        inputs[0] = inputs[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    return inputs


def results(op: str, between: Callable[[], object] = lambda: None) -> list[Tensor]:
    """The operation's result and its gradients; ``between`` is called before the backward pass."""
    differentiable = op not in ("attention_decode", "linear_topk")
    inputs = [x.requires_grad_(differentiable) for x in inputs_of(op)]
    out = CASES[op][0](*inputs)
    between()
    if not differentiable:
        return [out]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def main() -> None:
    torch.set_num_threads(4)
    before = threads()
    expected = {op: results(op) for op in CASES}
    assert threads() > before, "the parent used no threads"
    operator = torch.ops.fasttransformer.softmax
    x = torch.ones(700, 500)
    operator(x, 1.0, None, False, False)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive its test
        # What compiled graphs do: no front is passed that could look for a fork.
        print("operator", end=" ", flush=True)
        row = operator(x, 1.0, None, False, False)[-1]  # torch takes no second thread for a row
        print("same" if row.sub(0.002).abs().max() < 1e-9 else "DIFFERS", flush=True)
        for op in CASES:
            print(op, end=" ", flush=True)
            print("same" if same(results(op), expected[op]) else "DIFFERS", flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
