"""Derivatives of every operation and swapped module through torch.func's transforms, forward mode,
and derivatives of derivatives: the right number, or NotImplementedError.

What is right is said by plain autograd on the reference in float64, sample by sample: neither vmap
nor forward mode nor a transform has a part in it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fasttransformer as ft
from contract import On, backends_of, running_on
from fasttransformer._libraries import interpreted
from fasttransformer.backends import ALIASES, TABLE

Tensors = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


# ---- operations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``call(*inputs)`` on inputs of the given shapes, all of which are differentiated."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]
    what: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.what}" if self.what else self.op


def _ids(*ids: int) -> Tensor:
    return torch.tensor(ids)


def _drops(call: Callable[..., Any]) -> Callable[..., Any]:
    def seeded(*inputs: Tensor) -> Any:
        torch.manual_seed(5)
        return call(*inputs)

    return seeded


def _decode(query: Tensor, **options: Any) -> Any:
    draw = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 1, 6, 4, generator=draw, dtype=torch.float64).unbind()
    dtype = query.dtype
    cache = ft.KVCache(keys.to(dtype), values.to(dtype), torch.tensor([[6, 4]], dtype=torch.int32))
    return ft.attention_decode(query, cache, **options)


MASK = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
QKV = ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2))
LINEAR = ((3, 4), (5, 4), (5,), (3, 5))

CASES = [
    Case("softmax", ((2, 3, 4),), ft.softmax),
    Case("softmax", ((3, 4),), lambda x: ft.softmax(x, scale=0.7, mask=MASK), "mask"),
    Case("softmax", ((4, 3),), lambda x: ft.softmax(x, 0), "dim 0"),
    Case("log_softmax", ((2, 4, 4),), ft.log_softmax),
    Case("layer_norm", ((2, 3, 4), (4,), (4,)), lambda x, w, b: ft.layer_norm(x, 4, w, b)),
    Case("layer_norm", ((2, 3, 4),), lambda x: ft.layer_norm(x, (3, 4)), "no weight"),
    Case("rms_norm", ((2, 3, 4), (4,)), lambda x, w: ft.rms_norm(x, 4, w)),
    Case(
        "add_layer_norm",
        ((3, 4), (3, 4), (4,), (4,)),
        lambda x, r, w, b: ft.add_layer_norm(x, r, 4, w, b),
    ),
    Case(
        "add_layer_norm",
        ((3, 4), (3, 4), (4,), (4,)),
        _drops(lambda x, r, w, b: ft.add_layer_norm(x, r, 4, w, b, dropout_p=0.4)),
        "dropout",
    ),
    Case("add_rms_norm", ((3, 4), (3, 4), (4,)), lambda x, r, w: ft.add_rms_norm(x, r, 4, w)),
    Case("linear_add", LINEAR, ft.linear_add),
    Case("linear_add", ((2, 2, 3, 2), (5, 4)), ft.linear_add, "heads"),
    Case("linear_add", LINEAR, lambda *x: ft.linear_add(*x, activation="gelu"), "gelu"),
    Case(
        "linear_add",
        LINEAR,
        _drops(lambda *x: ft.linear_add(*x, activation="silu", dropout_p=0.4)),
        "silu, dropout",
    ),
    Case("linear_add_layer_norm", (*LINEAR, (5,), (5,)), ft.linear_add_layer_norm),
    Case("linear_add_rms_norm", (*LINEAR, (5,)), ft.linear_add_rms_norm),
    Case(
        "linear_add_rms_norm",
        (*LINEAR, (5,)),
        _drops(lambda *x: ft.linear_add_rms_norm(*x, dropout_p=0.4, return_sum=False)),
        "dropout",
    ),
    Case("feed_forward", ((3, 4), (6, 4), (6,), (2, 6), (2,)), ft.feed_forward),
    Case(
        "feed_forward",
        ((3, 4), (6, 4), (6,), (2, 3), (2,)),
        _drops(lambda *x: ft.feed_forward(*x, activation="swiglu", dropout_p=0.3)),
        "swiglu, dropout",
    ),
    Case("attention", QKV, ft.attention),
    Case("attention", QKV, lambda *x: ft.attention(*x, mask=MASK, return_lse=True)[0], "mask"),
    Case(
        "attention",
        (*QKV, (2, 3, 4), (2,)),
        lambda q, k, v, bias, sinks: ft.attention(
            q,
            k,
            v,
            bias=bias,
            sinks=sinks,
            softcap=3.0,
            is_causal=True,
            return_lse=True,
            causal_alignment="bottom_right",
        ),
        "bias, sinks, softcap, causal, lse",
    ),
    Case(
        "attention",
        QKV,
        lambda *x: ft.attention(
            *x, window=(1, 1), alibi_slopes=torch.tensor([0.5, 0.2]), key_lengths=_ids(3)
        ),
        "window, slopes, lengths",
    ),
    Case("attention", QKV, _drops(lambda *x: ft.attention(*x, dropout_p=0.3)), "dropout"),
    Case(
        "attention",
        (*QKV, (2,)),
        lambda *x: ft.attention(*x[:3], alibi_slopes=x[3]),
        "gradient of the slopes",
    ),
    Case(
        "scaled_dot_product_attention",
        ((2, 3, 4), (2, 4, 4), (2, 4, 2), (3, 4)),
        ft.scaled_dot_product_attention,
    ),
    Case(
        "attention_varlen",
        ((5, 2, 4), (6, 1, 4), (6, 1, 2), (1, 2, 3, 4)),
        lambda q, k, v, bias: ft.attention_varlen(
            q, k, v, _ids(0, 3, 5), _ids(0, 2, 6), bias=bias, return_lse=True
        ),
    ),
    Case("attention_decode", ((2, 2, 1, 4),), _decode),
    Case("attention_decode", ((2, 2, 2, 4), (2,)), lambda q, s: _decode(q, sinks=s), "sinks"),
    Case("merge_attention", ((2, 3, 4), (2, 3)), ft.merge_attention),
    Case(
        "merge_attention",
        ((3, 4), (3, 4), (3,), (3,)),
        lambda a, b, c, d: ft.merge_attention([a, b], [c, d]),
        "lists",
    ),
    Case("cross_entropy", ((3, 5),), lambda x: ft.cross_entropy(x, _ids(4, -100, 0))),
    Case(
        "cross_entropy",
        ((2, 5, 3), (5,)),
        lambda x, w: ft.cross_entropy(
            x, _ids(4, 1, 0, 0, 2, 2).view(2, 3), w.exp(), label_smoothing=0.1, reduction="none"
        ),
        "gradient of the weights",
    ),
    Case("cross_entropy", ((3, 5), (3, 5)), lambda x, p: ft.cross_entropy(x, p), "probabilities"),
    Case(
        "linear_cross_entropy",
        ((3, 4), (5, 4), (5,)),
        lambda x, w, b: ft.linear_cross_entropy(x, w, _ids(4, -100, 0), linear_bias=b),
    ),
    Case(
        "linear_cross_entropy",
        ((3, 4), (5, 4)),
        lambda x, w: ft.linear_cross_entropy(
            x, w, _ids(4, 1, 0), reduction="none", label_smoothing=0.2
        ),
        "each row",
    ),
    Case("linear_softmax", ((3, 4), (5, 4), (5,)), ft.linear_softmax),
    Case("linear_topk", ((3, 4), (5, 4), (5,)), lambda *x: ft.linear_topk(*x, k=2)),
    Case("embedding", ((5, 4),), lambda w: ft.embedding(_ids(3, 0, 3), w, scale=2.0)),
    Case(
        "embedding",
        ((5, 4), (3, 4)),
        lambda w, p: ft.embedding(
            _ids(3, 0, 3, 1).view(2, 2), w, position_weight=p, sinusoidal=True, padding_idx=2
        ),
        "positions",
    ),
    Case(
        "rotary_embedding",
        ((1, 2, 3, 4), (1, 1, 3, 4)),
        lambda q, k: ft.rotary_embedding(q, k, *_tables(q.dtype), position_ids=_ids(4, 0, 2)),
    ),
    Case(
        "rotary_embedding",
        ((1, 2, 3, 4), (1, 1, 3, 4), (3, 2), (3, 2)),
        lambda *x: ft.rotary_embedding(*x, interleaved=True),
        "gradient of the tables",
    ),
]


def _tables(dtype: torch.dtype) -> Tensors:
    angles = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_every_operation_has_a_case():
    assert {case.op for case in CASES} == {*TABLE, *ALIASES}


class LossOf:
    """The sum of :meth:`parts`, in which every output has a first and a second derivative."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def parts(self, *inputs: Tensor) -> Tensor:
        outs = self.call(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        # torch makes float64 of the tangent of a tensor without dimensions, so there is none here.
        found = torch.cat([out.flatten() for out in outs if out.is_floating_point()])
        place = torch.arange(len(found), dtype=found.dtype)
        return ((found + 0.3) * (1.0 + place.cos())).square()

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.parts(*inputs).sum()


def loss_of(case: Case) -> LossOf:
    return LossOf(case.call)


def drawn(case: Case, *lead: int) -> Tensors:
    return tuple(torch.randn(*lead, *shape) for shape in case.shapes)


# ---- transforms ---------------------------------------------------------------------------------

SAMPLES = 3


def every(inputs: Tensors) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def batched(f: Loss, dims: Any = 0) -> Loss:
    return vmap(f, dims, randomness="same")


def around(f: Loss, inputs: Tensors) -> Tensors:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves)


def dot(xs: Tensors, vs: Tensors) -> Tensor:
    return sum(((x * v).sum() for x, v in zip(xs, vs)), torch.zeros(()))


def gradient(f: Loss, inputs: Tensors) -> Tensors:
    return grad(f, every(inputs))(*inputs)


def total(f: Loss, dims: Any = 0) -> Loss:
    return lambda *xs: batched(f, dims)(*xs).sum()


def first_mapped(inputs: Tensors) -> tuple[int | None, ...]:
    return (0, *(None,) * (len(inputs) - 1))


def dual(f: Loss, inputs: Tensors, vs: Tensors) -> Tensors:
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(x, v) for x, v in zip(inputs, vs)))
        tangent = forward_ad.unpack_dual(out.log1p()).tangent
    assert tangent is not None, "the tangent is lost"
    return (tangent,)


def double_backward(f: Loss, inputs: Tensors, vs: Tensors) -> Tensors:
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    # The gradient of what a loss is linear in may be constant, which is as good as 0.
    return torch.autograd.grad(dot(first, vs) + dot(tuple(leaves), vs), leaves)


def hessian_vector(f: Loss, inputs: Tensors, vs: Tensors) -> Tensors:
    """By plain autograd: what second derivatives are compared with."""
    return tuple(x - v for x, v in zip(double_backward(f, inputs, vs), vs))


#: One gradient is wanted, so kernels run; (f, stacked inputs) → derivatives.
FIRST: dict[str, Callable[[LossOf, Tensors], Any]] = {
    "vmap": lambda f, xs: (batched(f)(*xs),),
    "vmap of grad": lambda f, xs: batched(grad(f, every(xs)))(*xs),
    "grad of vmap": lambda f, xs: gradient(total(f), xs),
    "grad of vmap over the first": lambda f, xs: gradient(total(f, first_mapped(xs)), one(xs)),
    "jacrev of vmap": lambda f, xs: tuple(
        j.sum(0) for j in jacrev(batched(f), every(xs))(*xs)
    ),
    "jacrev": lambda f, xs: tuple(j.sum(0) for j in jacrev(f.parts, every(xs))(*first(xs))),
    "autograd of many cotangents": lambda f, xs: tuple(
        j.sum(0) for j in _jacobians(f, first(xs))
    ),
    "autograd around vmap": lambda f, xs: around(total(f), xs),
    "autograd around vmap over the first": lambda f, xs: around(
        total(f, first_mapped(xs)), one(xs)
    ),
}  # fmt: skip


#: What an operation's kernels can't do of it.
REFUSED = {"merge_attention": ("autograd of many cotangents",)}


def first(stacked: Tensors) -> Tensors:
    return tuple(x[0] for x in stacked)


def _jacobians(f: LossOf, inputs: Tensors) -> Tensors:
    leaves = [x.clone().requires_grad_() for x in inputs]
    parts = f.parts(*leaves)
    return torch.autograd.grad(parts, leaves, torch.eye(len(parts)), is_grads_batched=True)


def one(stacked: Tensors) -> Tensors:
    """All samples of the first input, the first sample of each other."""
    return (stacked[0], *(x[0] for x in stacked[1:]))


def expected_first(name: str, f: Loss, stacked: Tensors) -> Tensors:
    samples = list(zip(*stacked))
    if name in ("jacrev", "autograd of many cotangents"):
        return around(f, first(stacked))
    if name == "vmap":
        return (torch.stack([f(*xs) for xs in samples]),)
    if "over the first" in name:
        others = tuple(x[0] for x in stacked[1:])
        grads = [around(f, (x, *others)) for x in stacked[0]]
        return (
            torch.stack([g[0] for g in grads]),
            *(torch.stack(g).sum(0) for g in zip(*(g[1:] for g in grads))),
        )
    return tuple(torch.stack(part) for part in zip(*(around(f, xs) for xs in samples)))


def _of_vmap(how: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """A derivative of the sum over samples, two of them equal."""

    def of_vmap(f: Loss, inputs: Tensors, vs: Tensors) -> Tensors:
        # f(x) = (3 f(x) - f(x) - f(x)): each sample counts, the derivative is the single one's.
        factors = torch.tensor([3.0, -1.0, -1.0], dtype=inputs[0].dtype)

        def sample(factor: Tensor, *xs: Tensor) -> Tensor:
            return factor * f(*xs)

        def loss(*xs: Tensor) -> Tensor:
            stacked = tuple(torch.stack([x, x, x]) for x in xs)
            return batched(sample)(factors, *stacked).sum()

        return how(loss, inputs, vs)

    return of_vmap


def _jvp(f: Loss, xs: Tensors, vs: Tensors) -> Tensors:
    return (jvp(f, xs, vs)[1],)


def _grad_of_grad(f: Loss, xs: Tensors, vs: Tensors) -> Tensors:
    return gradient(lambda *xs: dot(gradient(f, xs), vs), xs)


#: What no kernel has: (f, inputs, directions) → derivatives.
BEYOND: dict[str, Callable[[Loss, Tensors, Tensors], Any]] = {
    "jvp": _jvp,
    "jvp of vmap": _of_vmap(_jvp),
    "vmap of jvp": lambda f, xs, vs: (
        batched(lambda *vs: jvp(f, xs, vs)[1])(*(torch.stack([v]) for v in vs))[0],
    ),
    "jacfwd": lambda f, xs, vs: (dot(jacfwd(f, every(xs), randomness="same")(*xs), vs),),
    "dual_level": dual,
    "dual_level around vmap": _of_vmap(dual),
    "dual_level around grad": lambda f, xs, vs: _dual_of_grad(f, xs, vs),
    "grad of grad": _grad_of_grad,
    "grad of grad of vmap": _of_vmap(_grad_of_grad),
    "grad of jvp": lambda f, xs, vs: gradient(lambda *xs: jvp(f, xs, vs)[1], xs),
    "jvp of grad": lambda f, xs, vs: jvp(grad(f, every(xs)), xs, vs)[1],
    "autograd around grad": lambda f, xs, vs: around(lambda *xs: dot(gradient(f, xs), vs), xs),
    "hessian": lambda f, xs, vs: (
        torch.tensordot(
            _hessian(lambda x: f(x, *xs[1:]))(xs[0]), vs[0], vs[0].dim()
        ),
    ),
    "jacrev of jacrev": lambda f, xs, vs: (
        torch.tensordot(
            jacrev(jacrev(lambda x: f(x, *xs[1:])))(xs[0]), vs[0], vs[0].dim()
        ),
    ),
}  # fmt: skip
OF_THE_FIRST = ("hessian", "jacrev of jacrev")


def _hessian(f: Loss) -> Callable[..., Tensor]:
    return jacfwd(jacrev(f), randomness="same")


def _dual_of_grad(f: Loss, xs: Tensors, vs: Tensors) -> Tensors:
    with forward_ad.dual_level():
        grads = gradient(f, tuple(forward_ad.make_dual(x, v) for x, v in zip(xs, vs)))
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    return tuple(torch.zeros_like(x) if t is None else t for x, t in zip(xs, tangents))


def expected_beyond(name: str, f: Loss, inputs: Tensors, vs: Tensors) -> Tensors:
    if name in OF_THE_FIRST:
        return hessian_vector(lambda x: f(x, *inputs[1:]), inputs[:1], vs[:1])
    if "grad" in name:
        return hessian_vector(f, inputs, vs)
    along = dot(around(f, inputs), vs)
    if name.startswith("dual_level"):
        return (along / (1.0 + f(*inputs)),)
    return (along,)


# ---- tests --------------------------------------------------------------------------------------


def runs_on(op: str) -> Iterator[On]:
    """The reference, the CPU's kernel whatever its instruction set, and interpreted Triton."""
    named = {on.partition(":")[0] for on in backends_of(ALIASES.get(op, op))}
    for on in ("torch", "cpu", "triton"):
        if on in named and (on != "triton" or interpreted()):
            yield On(on, op)


def doubled(*tensors: Tensor) -> Tensors:
    return tuple(x.double() for x in tensors)


def same(found: Tensors, want: Tensors) -> None:
    assert len(found) == len(want)
    for ours, truth in zip(found, want):
        assert ours.dtype == torch.float32
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(
            ours.double() / scale, truth / scale, rtol=0.0, atol=2e-5, msg=str
        )


def has_gradient(case: Case, on: str) -> bool:
    """Whether the case's gradient runs on that backend, and not on the reference instead of it."""
    inputs = [x.requires_grad_() for x in drawn(case)]
    try:
        with ft.use_backend(on):
            loss_of(case)(*inputs)
    except RuntimeError as error:
        assert "can't do this" in str(error) and not isinstance(error, NotImplementedError)
        return False
    return True


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize(("case", "on"), [(c, on) for c in CASES for on in runs_on(c.op)], ids=str)
def test_one_gradient(case, on, name):
    """f1: `needs_grad` asked a batched tensor, which hides that a gradient is wanted inside."""
    inputs, loss = drawn(case, SAMPLES), loss_of(case)
    on_kernel = has_gradient(case, str(on))
    if on == "triton" and not on_kernel:
        pytest.skip("the reference runs, as on other backends")
    refused = on_kernel and on != "torch" and name in REFUSED.get(case.op, ())
    with running_on(on) if on_kernel else contextlib.nullcontext():
        if refused:
            with pytest.raises(NotImplementedError, match=case.op):
                FIRST[name](loss, inputs)
            return
        found = FIRST[name](loss, inputs)
    same(found, expected_first(name, loss, doubled(*inputs)))


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_more_than_a_gradient(case, name):
    """b88, f1, f2: tangents, and gradients of gradients, were 0 or None without a word."""
    inputs, vs, loss = drawn(case), drawn(case), loss_of(case)
    want = expected_beyond(name, loss, doubled(*inputs), doubled(*vs))
    same(BEYOND[name](loss, inputs, vs), want)
    for on in runs_on(case.op):
        if on == "torch":
            with ft.use_backend("torch"):
                same(BEYOND[name](loss, inputs, vs), want)
        else:
            with pytest.raises(NotImplementedError, match=f"backend '{on}' was asked for but"):
                with ft.use_backend(str(on)):
                    BEYOND[name](loss, inputs, vs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_that_autograd_records(case):
    """Plain double backward: by the reference right, of a kernel's gradient refused."""
    inputs, vs, loss = drawn(case), drawn(case), loss_of(case)
    want = hessian_vector(loss, *(doubled(*xs) for xs in (inputs, vs)))
    with ft.use_backend("torch"):
        same(hessian_vector(loss, inputs, vs), want)
    kernels = [on for on in runs_on(case.op) if on != "torch" and has_gradient(case, str(on))]
    for on in kernels:
        mapped = lambda *xs: batched(lambda factor: factor * loss(*xs))(torch.ones(2)).sum()  # noqa
        for f in (loss, mapped):
            with ft.use_backend(str(on)), pytest.raises(NotImplementedError, match='"torch"'):
                hessian_vector(f, inputs, vs)
    if not kernels:
        same(hessian_vector(loss, inputs, vs), want)
    assert kernels or case.op in FORWARD_ONLY or "gradient of" in case.what or (
        case.what == "probabilities"
    )  # fmt: skip


#: No kernel has a gradient, so each is the reference's.
FORWARD_ONLY = ("attention_decode", "linear_topk")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_derivative_of_a_pulled_back_vector(case):
    """The transform that recorded the operation is over when its gradient is differentiated."""
    inputs, loss = drawn(case), loss_of(case)
    one = torch.ones(())

    def pulled(back: Callable[[Tensor], Tensors], factor: Tensor) -> Tensor:
        return sum((g.square().sum() for g in back(factor)), factor.new_zeros(()))

    def derivatives(loss: Loss, inputs: Tensors, one: Tensor) -> list[Tensor]:
        back = vjp(loss, *inputs)[1]
        leaf = one.clone().requires_grad_()
        ways = (
            lambda: grad(lambda factor: pulled(back, factor))(one),
            lambda: jvp(lambda factor: pulled(back, factor), (one,), (one,))[1],
            lambda: torch.autograd.grad(pulled(back, leaf), leaf)[0],
        )
        found = []
        for way in ways:
            try:
                found.append(way())
            except NotImplementedError:
                found.append(None)
        return found

    square = sum(g.square().sum() for g in around(loss, doubled(*inputs)))
    with ft.use_backend("torch"):
        for found in derivatives(loss, inputs, one):
            same((found,), (2 * square,))
    for found in derivatives(loss, inputs, one):
        if found is not None:
            same((found,), (2 * square,))


def test_explain_says_why_no_kernel_runs():
    reasons = []

    def look(x: Tensor) -> Tensor:
        reasons.append(str(ft.explain("softmax", x)))
        return x.sum()

    x = torch.randn(2, 3)
    jvp(look, (x,), (x,))
    grad(lambda x: grad(look)(x).sum())(x)
    grad(look)(x)
    assert "cpu: no, a derivative in forward mode is wanted" in reasons[0]
    assert "cpu: no, a gradient of a gradient is wanted" in reasons[1]
    assert "runs on: cpu" in reasons[2]


def test_only_what_is_recorded_counts():
    """A kernel runs wherever one gradient at most is wanted."""
    x, w = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    with ft.use_backend("cpu"):
        with torch.no_grad():  # w is of no interest to anyone
            grad(lambda x: ft.linear_add(x, w).sum())(x)
        with forward_ad.dual_level():
            ft.linear_add(x, w).sum().backward()
        jvp(lambda y: ft.linear_add(x, w).detach().sum() + y, (x[0, 0],), (x[0, 0],))
        with pytest.raises(NotImplementedError):
            grad(lambda x: ft.linear_add(x, w).sum())(x)
    got = grad(lambda x: ft.linear_add(x, w).square().sum())(x)
    again = torch.autograd.grad(got.sum(), w)[0]
    want = grad(lambda x: (x @ w.mT).square().sum())(x)
    torch.testing.assert_close(again, torch.autograd.grad(want.sum(), w)[0])


# ---- modules ------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 6),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "Softmax": lambda: nn.Softmax(-1),
    "MultiheadAttention": SelfAttention,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True
    ),
    "TransformerEncoderLayer, pre-norm": lambda: nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ),
}


def made(kind: str) -> tuple[nn.Module, nn.Module]:
    """(swapped, the original in float64), in training: torch's fast path knows no transforms."""
    original = MODULES[kind]().train()
    for p in original.parameters():
        nn.init.normal_(p, std=0.5)
    swapped = copy.deepcopy(original)
    ft.swap(swapped)
    assert any(type(m).__module__.startswith("fasttransformer") for m in swapped.modules())
    return swapped, original.double()


def module_loss(module: nn.Module) -> LossOf:
    def call(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # torch's others have no second derivative
            return module(x)

    return LossOf(call)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", MODULES)
def test_swapped_modules(kind, frozen):
    swapped, original = (m.requires_grad_(not frozen) for m in made(kind))
    xs, vs = (torch.randn(2, 3, 8),), (torch.randn(2, 3, 8),)
    loss, truth = module_loss(swapped), module_loss(original)
    for name, derivative in BEYOND.items():
        same(derivative(loss, xs, vs), expected_beyond(name, truth, doubled(*xs), doubled(*vs)))
    stacked = (torch.randn(SAMPLES, 2, 3, 8),)
    for name, derivative in FIRST.items():
        if "over the first" not in name:
            same(derivative(loss, stacked), expected_first(name, truth, doubled(*stacked)))


@pytest.mark.parametrize("kind", [k for k in MODULES if k != "Softmax"])
def test_ensembles_of_swapped_modules(kind):
    """f1: models whose parameters are stacked, and run as one by vmap."""
    pairs = [made(kind) for _ in range(2)]
    swapped = [pair[0] for pair in pairs]
    parameters, _ = stack_module_state(swapped)
    x = torch.randn(2, 3, 8)
    names, values = list(parameters), tuple(p.detach() for p in parameters.values())

    def one_model(*values: Tensor) -> Tensor:
        state = dict(zip(names, values))
        return module_loss(lambda x: functional_call(swapped[0], (state, {}), (x,)))(x)

    want = []
    for _, original in pairs:
        own = dict(original.named_parameters())
        loss = module_loss(original)(x.double())
        want.append(torch.autograd.grad(loss, [own[name] for name in names]))
    want = tuple(torch.stack(part) for part in zip(*want))
    same(gradient(total(one_model), values), want)
    same(around(total(one_model), values), want)
    same(batched(grad(one_model, every(values)))(*values), want)
    vs = tuple(torch.randn_like(v) for v in values)
    along = dot(want, doubled(*vs))
    same((jvp(total(one_model), values, vs)[1],), (along,))
    same(dual(total(one_model), values, vs), (along / (1.0 + total(one_model)(*values).double()),))
