"""linear_topk: equals softmax and a stable sort, ties, pieces of rows, bad input."""

import pytest
import torch
from attention_cases import other_signs
from fronts import refuses, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops import _output_layer

BACKENDS = backends_of("linear_topk")
CPU = [on for on in BACKENDS if on.startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("k", [0, 1, 4, 11])
def test_equals_the_sorted_softmax(monkeypatch, k, lead, pieces):
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 25)  # two rows
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(11, dtype=torch.float64)
    with running_on("torch"):
        values, indices = ft.linear_topk(x, w, b, k=k, temperature=0.7)
    p = torch.softmax((x @ w.T + b) / 0.7, -1)
    want = p.sort(-1, descending=True)
    torch.testing.assert_close(values, want.values[..., :k])
    assert torch.equal(indices, want.indices[..., :k])
    weights = torch.rand_like(values)
    got = torch.autograd.grad((values * weights).sum(), (x, w))
    expected = torch.autograd.grad((want.values[..., :k] * weights).sum(), (x, w))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 11])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, lead, k, dtype):
    inputs = [torch.randn(*lead, 7), torch.randn(11, 7), torch.randn(11)]
    inputs = [t.to(dtype) for t in inputs]
    check(
        lambda *args: ft.linear_topk(*args, k=k, temperature=0.7)[0],
        lambda *args: reference.linear_topk(*args, k=k, temperature=0.7)[0],
        inputs,
        on=on,
        grads=False,
        redraw=lambda: other_signs(inputs),
    )


def whole(rows, features, classes):
    """Small integers: products without rounding, and many that are equal."""
    return (torch.randint(-2, 3, size).float() for size in ((rows, features), (classes, features)))


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200])
@pytest.mark.parametrize("classes, k", [(5, 5), (33, 7), (700, 50), (700, 128), (700, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_of_equal_logits_the_lower_index_comes_first(on, rows, classes, k, dtype):
    """Few classes and many, k that is kept in lists and k that is not."""
    x, w = (t.to(dtype) for t in whole(rows, 6, classes))
    with running_on(on):
        values, indices = ft.linear_topk(x, w, k=k)
    logits = x.float() @ w.float().T
    assert torch.equal(indices, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    want = torch.softmax(logits, -1).gather(-1, indices).to(dtype)
    torch.testing.assert_close(values, want, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-7)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@pytest.mark.parametrize("on", CPU)
def test_many_classes_in_order(on, order):
    """Where every class beats those before it, none does, or all are the same."""
    w = torch.linspace(-4, 4, 5000)[:, None]
    w = {"rising": w, "falling": w.flip(0), "equal": torch.ones_like(w)}[order]
    x = torch.tensor([[1.0], [0.5]])
    with running_on(on):
        values, indices = ft.linear_topk(x, w, k=100)
    first = torch.arange(100)
    assert torch.equal(indices, (4999 - first if order == "rising" else first).expand(2, 100))
    want = torch.softmax((x @ w.T).double(), -1).gather(-1, indices)
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [4, 20])
@pytest.mark.parametrize("on", BACKENDS)
def test_nan_and_infinities(on, k):
    """A NaN makes its row NaN and comes first; −inf is never chosen before a number; −0 is 0."""
    x, w = torch.eye(5), torch.randn(300, 5)
    w[7, 0], w[:, 1], w[250:, 2], w[3, 3] = float("nan"), -float("inf"), -float("inf"), float("inf")
    w[:, 4] = -0.0
    w[200, 4] = 0.0
    x.fill_diagonal_(1.0)
    logits = w.T  # x selects columns of w; products with 0 would be NaN
    bias = torch.zeros(300)
    for row in range(5):
        with running_on(on):
            values, indices = ft.linear_topk(
                torch.ones(1, 1), logits[row][:, None].contiguous(), bias, k=k
            )
        want = reference.linear_topk(torch.ones(1, 1), logits[row][:, None], bias, k=k)
        torch.testing.assert_close(values, want[0], equal_nan=True)
        assert torch.equal(indices, want[1])


@pytest.mark.parametrize("on", CPU[-1:])
def test_threads_change_nothing(on, two_threads):
    x, w = torch.randn(5, 40), torch.randn(3000, 40)

    def results():
        with running_on(on):
            return *ft.linear_topk(x, w, k=20), *ft.linear_topk(x, w, k=200)

    two = results()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results(), two))


def test_dtypes_compile_autocast_backend():
    x, w = torch.randn(4, 7), torch.randn(11, 7)
    values, indices = ft.linear_topk(x.bfloat16(), w.bfloat16(), k=3)
    assert values.dtype == torch.bfloat16 and indices.dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.linear_topk(x, w, k=3)[0].dtype == torch.bfloat16
    same_compiled(lambda x, w: ft.linear_topk(x, w, k=3)[0], x, w)
    with torch.no_grad():
        compiled = torch.compile(ft.linear_topk, fullgraph=True)(x, w, k=3)
        torch.testing.assert_close(compiled, ft.linear_topk(x, w, k=3))
    samples = torch.func.vmap(lambda x: ft.linear_topk(x, w, k=3))(torch.stack((x, -x)))
    torch.testing.assert_close(samples[0][1], ft.linear_topk(-x, w, k=3)[0])
    # Values can be differentiated, on the reference.
    assert ft.explain("linear_topk", x.requires_grad_(), w, k=3).backend == "torch"
    if CPU:
        arguments = (x.detach(), w, None, 3, 0.7)
        torch.library.opcheck(torch.ops.fasttransformer.linear_topk.default, arguments)


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 4)}, ValueError, "its last dimension must be 3"),
    ({"input": torch.ones(2, 3).int()}, TypeError, "input has dtype torch.int32"),
    ({"k": 6}, ValueError, "k is 6; it must be in [0, 5]"),
    ({"k": -1}, ValueError, "k is -1"),
    ({"k": 2.0}, TypeError, "k is 2.0; it must be an integer"),
    ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.randn(2, 3), "weight": torch.randn(5, 3), "k": 2}
    refuses("linear_topk", arguments, change, error, text)
