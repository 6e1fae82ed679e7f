"""What every norm must do, as functions of the operation: the norms' test files call them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, Norm, first, sizes_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fasttransformer as ft
from contract import check, running_on
from fasttransformer.backends import TABLE


def check_sizes(norm: Norm, on: str, dtype: torch.dtype) -> None:
    for rows, features in sizes_of(on):
        # The gradient of an RMS norm over one feature has its own bound: check_one_feature.
        grads = features > 1 or norm.has_bias
        options = {} if norm.has_bias else {"eps": 1e-6}

        def draw(shape: tuple[int, int] = (rows, features)) -> list[Tensor]:
            return norm.inputs(shape, 1, dtype)

        check(
            norm.ours(**options), norm.reference(**options), draw(), grads=grads, on=on, redraw=draw
        )


def check_one_feature(norm: Norm, on: str, dtype: torch.dtype) -> None:
    """b51's kind: one feature makes the gradient of an RMS norm eps / (x² + eps) of its first term.

    In float32 it is the difference of two numbers that are nearly equal, and what is left is their
    rounding, ours and torch's alike; so the bound is each element's own: 8 half-units in the last
    place of the two terms (rstd has 3, the products 2 each), and one rounding of the result.
    """
    rows, half, eps = 300 if on != "triton" else 33, 2.0**-24, 1e-3
    x = torch.randint(-120, 121, (2, rows, 1)) / 32  # sums of two of these are exact in every dtype
    inputs = [t.to(dtype) for t in (*(x if norm.adds else x[:1]), torch.randn(1) + 2)]
    cotangents = [torch.randn(rows, 1).to(dtype) for _ in range(2 if norm.adds else 1)]

    def gradients(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.to(dtype).requires_grad_() for t in inputs]
        outs = function(*tensors)
        back = [c.to(dtype) for c in cotangents]
        grads = torch.autograd.grad(outs if norm.adds else [outs], tensors, back)
        return [g.cpu().double() for g in grads]

    with running_on(on):
        ours = gradients(norm.ours(eps=eps), dtype)
    wants = gradients(norm.reference(eps=eps), torch.float64)
    summed, weight = sum(t.double() for t in inputs[:-1]), inputs[-1].double()
    term = cotangents[0].double() * (summed.square() + eps).rsqrt()
    for got, want in zip(ours[:-1], wants[:-1], strict=True):
        bound = 8 * half * (term * weight).abs() + torch.finfo(dtype).eps * want.abs()
        bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        if on == "torch" and norm.adds:  # autograd rounds the two parts of the sum's gradient
            bound += torch.finfo(dtype).eps * cotangents[1].double().abs()
        assert ((got - want).abs() <= bound).all()
    bound = rows * half * (term * summed).abs().sum() + torch.finfo(dtype).eps * wants[-1].abs()
    assert (ours[-1] - wants[-1]).abs() <= bound


def check_b44_dtypes_of_weights(norm: Norm, on: str) -> None:
    for dtype, vector in (
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        inputs = norm.inputs((2, 8), 1, dtype)
        count = 2 if norm.adds else 1
        inputs = inputs[:count] + [v.to(vector) for v in inputs[count:]]
        with running_on(on):
            tensors = [t.requires_grad_() for t in inputs]
            out = first(norm.ours()(*tensors))
            assert out.dtype == dtype
            for t, g in zip(tensors, torch.autograd.grad(out.float().sum(), tensors)):
                assert g.dtype == t.dtype and g.shape == t.shape
        check(norm.ours(), norm.reference(), inputs, on=on)


def check_b52_shapes(norm: Norm, on: str) -> None:
    for shape, normalized in (((2, 3, 8), 1), ((2, 3, 4, 8), 2), ((0, 8), 1), ((8,), 1)):
        inputs = norm.inputs(shape, normalized, torch.float32)
        check(norm.ours(normalized), norm.reference(normalized), inputs, on=on)
        bare: list[Tensor | None] = list(inputs[: 2 if norm.adds else 1])
        check(norm.ours(normalized), norm.reference(normalized), bare, on=on)


def check_b52_only_wanted_gradients(norm: Norm, on: str) -> None:
    inputs = norm.inputs((5, 8), 1, torch.float32)
    for wanted in range(len(inputs)):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        with running_on(on):
            first(norm.ours()(*tensors)).square().sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(len(inputs))]


def check_strides(norm: Norm, on: str) -> None:
    def cut_and_turned() -> list[Tensor]:
        inputs = norm.inputs((6, 16), 1, torch.float32)
        for i in range(2 if norm.adds else 1):
            wide = torch.full((6, 40), float("nan"))
            wide[:, 3:19] = inputs[i]
            inputs[i] = wide[:, 3:19] if i == 0 else inputs[i].t().contiguous().t()
        return inputs

    def small() -> list[Tensor]:
        return norm.inputs((2, 3, 8), 1, torch.float32)

    def transposed(*tensors: Tensor) -> object:
        return norm.ours()(*(t.transpose(0, 1) if t.dim() == 3 else t for t in tensors))

    def reference(*tensors: Tensor) -> object:
        return norm.reference()(*(t.transpose(0, 1) if t.dim() == 3 else t for t in tensors))

    check(norm.ours(), norm.reference(), cut_and_turned(), on=on, redraw=cut_and_turned)
    check(transposed, reference, small(), on=on, redraw=small)


def check_nan_stays_in_its_row(norm: Norm, on: str) -> None:
    for dtype in DTYPES:
        inputs = norm.inputs((7, 40), 1, dtype)
        inputs[0][2, 5], inputs[0][4, 0] = float("nan"), float("inf")
        with running_on(on):
            out = first(norm.ours()(*inputs))
        rows = out.isnan().any(-1).tolist()
        assert rows == [r in (2, 4) for r in range(7)]
        assert out[2].isnan().all()


def check_nan_of_any_bits_in_weights(norm: Norm, on: str) -> None:
    """A NaN with all bits set, as raw memory has it, must not round to a number in 16 bits."""
    for dtype in DTYPES:
        inputs = norm.inputs((7, 40), 1, dtype)
        for at, vector in enumerate(inputs):
            if vector.dim() != 1:
                continue
            bad = vector.float()
            bad.view(torch.int32)[[3, 38]] = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32)
            with running_on(on):
                out = first(norm.ours()(*inputs[:at], bad, *inputs[at + 1 :]))
            assert out.isnan().any(0).nonzero().flatten().tolist() == [3, 38]


def check_without_the_sum(op: str, problem: Callable[..., tuple[Tensor, ...]], on: str) -> None:
    """normed is the same, where the sum is never written and where gradients need it.

    ``problem`` makes the inputs of a linear layer with a norm for (rows, in, out).
    """
    function = getattr(ft, op)
    for shape in ((3, 5, 17), (17, 40, 1100), (300, 24, 33), (200, 3, 4100), (0, 9, 8)):
        if on == "triton" and shape[2] > 1000:
            continue
        inputs = problem(*shape)
        leaves = [t.clone().requires_grad_() for t in inputs]
        launched = None if 0 in shape else True
        with running_on(on, launched=launched):
            normed, _ = function(*inputs)
            alone = function(*inputs, return_sum=False)
            trained = function(*leaves, return_sum=False)
        assert torch.equal(alone, normed) and torch.equal(trained, normed)
        if on == "torch":
            continue
        with running_on(on, launched=launched):
            gradients = torch.autograd.grad(trained.sum(), leaves)
            both, _ = function(*leaves)
            assert all(map(torch.equal, gradients, torch.autograd.grad(both.sum(), leaves)))


def check_deterministic_gradients(norm: Norm) -> None:
    """The same bits on any number of threads, and whatever rows stand beside a row."""
    inputs = norm.inputs((1037, 100), 1, torch.float32)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tensors = [t.clone().requires_grad_() for t in inputs]
            out = first(norm.ours(backend="cpu")(*tensors))
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    rows = 2 if norm.adds else 1
    alone = first(norm.ours(backend="cpu")(*(t[17:18] for t in inputs[:rows]), *inputs[rows:]))
    assert torch.equal(alone, found[0][0][17:18])


def check_operator_of_any_rank(norm: Norm, on: str) -> None:
    """The operator itself, forward and backward, on rows of 1, 3 and 4 dimensions: the numbers of
    the same rows as two, in the shape that came in; and the fake kernel agrees."""
    seed = torch.tensor([7])
    for dropout in [(0.0, None), (0.25, seed)] if norm.adds else [()]:
        for shape in ((16,), (2, 3, 16), (2, 1, 3, 16), (2, 0, 16)):
            inputs = norm.inputs(shape, 1, torch.float32)
            with running_on(on, launched=None if 0 in shape else True) as backend:
                kernel = TABLE[norm.op][backend]
                ops = kernel.forward, kernel.backward
                found = _both_operators(norm, *ops, inputs, dropout)
                rows = [t.reshape(-1, 16) if t.shape == shape and i < 1 + norm.adds else t
                        for i, t in enumerate(inputs)]  # fmt: skip
                flat = _both_operators(norm, *ops, rows, dropout)
            if on == "simt":  # its schemas are those of the package, which has the fake kernels
                space = torch.ops.fasttransformer
                ops = tuple(getattr(space, norm.op + part).default for part in ("", "_backward"))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(t) for t in inputs]
                faked = _both_operators(norm, *ops, fakes, dropout)
            for a, b, c in zip(found, flat, faked):
                assert torch.equal(a.reshape(b.shape), b)
                assert a.shape == c.shape and a.stride() == c.stride() and a.dtype == c.dtype
            assert found[0].shape == shape


def _both_operators(
    norm: Norm, forward: Any, backward: Any, inputs: list[Tensor], dropout: tuple
) -> list[Tensor]:
    first_vector = 1 + norm.adds
    outs = forward(*inputs, 1e-5, *dropout)
    rest = (None, *outs[1:2]) if norm.adds else (inputs[0],)
    flags = (True,) * (1 + norm.has_bias)
    return [*outs, *backward(
        inputs[0].cos(), *rest, inputs[first_vector], *outs[first_vector:], *dropout, *flags
    )]  # fmt: skip


def check_opcheck(norm: Norm) -> None:
    """b47, pytorch/pytorch#179287: real and fake kernels must agree on strides and dtypes."""
    ops = torch.ops.fasttransformer
    forward, backward = getattr(ops, norm.op), getattr(ops, f"{norm.op}_backward")
    seed = torch.tensor([7])
    for dropout in [(0.0, None), (0.25, seed)] if norm.adds else [()]:
        for vector in (torch.float32, torch.bfloat16, None):
            inputs = [torch.randn(5, 24)[:, 4:20] for _ in range(2 if norm.adds else 1)]
            if vector is None:
                inputs = [torch.randn(2, 3, 16) for _ in inputs]
            vectors = [None if vector is None else torch.randn(16, dtype=vector)]
            vectors += vectors if norm.has_bias else []
            args = (*inputs, *vectors, 1e-5, *dropout)
            torch.library.opcheck(forward.default, args)
            outs = forward(*args)
            statistics = outs[2:] if norm.adds else outs[1:]
            summed = (None, outs[1]) if norm.adds else (inputs[0],)
            for wanted in (True, False):
                flags = (wanted,) * (2 if norm.has_bias else 1)
                grad = torch.randn(inputs[0].shape)
                back = (grad, *summed, vectors[0], *statistics, *dropout, *flags)
                torch.library.opcheck(backward.default, back)


def check_compile(norm: Norm) -> None:
    inputs = [t.requires_grad_() for t in norm.inputs((3, 5, 8), 1, torch.float32)]

    def f(*tensors: Tensor) -> Tensor:
        out = norm.ours()(*tensors)
        return out[0] * 2 + out[1] if norm.adds else out * 2

    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(out, f(*inputs))
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad(f(*inputs).square().sum(), inputs)):
        assert torch.allclose(a, b, atol=1e-6)


def check_b46_vmap(norm: Norm) -> None:
    """pytorch/pytorch#151558: vmap must equal a loop, per-sample gradients included."""
    inputs = norm.inputs((4, 3, 8), 1, torch.float32)
    rows = 2 if norm.adds else 1
    dims = tuple(0 if i < rows else None for i in range(len(inputs)))
    f = norm.ours()
    out = first(torch.vmap(f, dims)(*inputs))
    for i in range(4):
        assert torch.allclose(out[i], first(f(*(t[i] for t in inputs[:rows]), *inputs[rows:])))

    def loss(*tensors: Tensor) -> Tensor:
        return first(f(*tensors)).square().sum()

    each = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
    grads = torch.vmap(each, dims)(*inputs)
    for i in range(4):
        tensors = [t[i] if j < rows else t for j, t in enumerate(inputs)]
        tensors = [t.clone().requires_grad_() for t in tensors]
        want = torch.autograd.grad(loss(*tensors), tensors)
        assert all(torch.allclose(g[i], w, atol=1e-5) for g, w in zip(grads, want))


def check_b69_small_work_on_one_thread(norm: Norm) -> None:
    """pytorch/pytorch#19163: thread settings ignored; tiny operations wake every core."""
    inputs = norm.inputs((4, 8), 1, torch.float32)
    f = norm.ours(backend="cpu")
    f(*inputs)
    # Process time counts every thread's, thread time this one's: equal when nobody else works.
    process, thread = time.process_time(), time.thread_time()
    for _ in range(3000):
        f(*inputs)
    process, thread = time.process_time() - process, time.thread_time() - thread
    assert process < 1.5 * thread + 0.02

    large = norm.inputs((512, 256), 1, torch.float32)
    before, threads = torch.get_num_threads(), len(os.listdir("/proc/self/task"))
    try:
        torch.set_num_threads(1)

        def work() -> Tensor:
            torch.set_num_threads(1)
            return first(f(*large))

        with ThreadPoolExecutor(2) as pool:
            outs = [job.result() for job in [pool.submit(work) for _ in range(8)]]
        assert all(torch.equal(o, outs[0]) for o in outs)
        assert len(os.listdir("/proc/self/task")) <= max(threads, threading.active_count()) + 2
    finally:
        torch.set_num_threads(before)


def check_bad_input(norm: Norm) -> None:
    x, w = torch.randn(3, 8), torch.randn(8)
    count = 2 if norm.adds else 1
    function = getattr(ft, norm.op)

    def call(*, x=x, residual=x, shape=(8,), weight=w, **options):
        return function(*(x, residual)[:count], shape, weight, **options)

    bad = [
        (TypeError, "input has dtype torch.int64", {"x": x.long(), "residual": x}),
        (TypeError, "weight has dtype torch.int64", {"weight": w.long()}),
        (ValueError, r"weight has shape \(7,\)", {"weight": w[:7]}),
        (ValueError, "normalized_shape", {"shape": (7,)}),
        (ValueError, "normalized_shape", {"shape": ()}),
        (ValueError, "eps is -1", {"eps": -1.0}),
        (ValueError, "eps is nan", {"eps": float("nan")}),
        (ValueError, "weight is on meta", {"weight": w.to("meta")}),
    ]
    if norm.adds:
        bad += [
            (ValueError, r"residual has shape \(3, 7\)", {"residual": x[:, :7]}),
            (TypeError, "residual has dtype torch.bfloat16", {"residual": x.bfloat16()}),
            (ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)", {"dropout_p": 1.0}),
            (ValueError, "dropout_p is -0.1", {"dropout_p": -0.1}),
        ]
    for error, words, options in bad:
        with pytest.raises(error, match=words):
            call(**options)
