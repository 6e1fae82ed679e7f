"""linear_softmax: the number contract, sizes, autocast, bad input."""

import pytest
import torch
from attention_cases import other_signs
from fronts import refuses, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference

BACKENDS = backends_of("linear_softmax")
CPU = [on for on in BACKENDS if on.startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def held(on, dtype, lead, features, classes, temperature=1.0):
    x = torch.randn(*lead, features) * 2 / features**0.5
    inputs = [x, torch.randn(classes, features), torch.randn(classes)]
    inputs = [t.to(dtype) for t in inputs]
    check(
        lambda *args: ft.linear_softmax(*args, temperature=temperature),
        lambda *args: reference.linear_softmax(*args, temperature=temperature),
        inputs,
        on=on,
        redraw=lambda: other_signs(inputs),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, lead, temperature, dtype):
    held(on, dtype, lead, 7, 11, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, features, classes", [(1, 1, 1), (3, 65, 33), (200, 40, 300)])
@pytest.mark.parametrize("on", BACKENDS)
def test_sizes(on, rows, features, classes, dtype):
    held(on, dtype, (rows,), features, classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", CPU[-1:])
def test_several_pieces_of_rows(on, dtype):
    """Rows longer than a block, of which 16 MiB of logits hold 209."""
    x, w = torch.randn(300, 3).to(dtype), torch.randn(20_000, 3).to(dtype)
    with running_on(on):
        p = ft.linear_softmax(x, w)
    rows = slice(200, 220)
    want = torch.softmax(x[rows].double() @ w.double().T, -1)
    rtol = 2 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(p[rows], want.to(dtype), rtol=rtol, atol=1e-7)
    torch.testing.assert_close(p.float().sum(-1), torch.ones(300), rtol=1e-3, atol=0)


@pytest.mark.parametrize("on", BACKENDS)
def test_rows_sum_to_one_whatever_the_temperature(on):
    x, w = torch.randn(4, 7) * 30, torch.randn(11, 7)
    for temperature in (1e-3, 1.0, 1e6):
        with running_on(on):
            p = ft.linear_softmax(x, w, temperature=temperature)
        torch.testing.assert_close(p.sum(-1), torch.ones(4))
    torch.testing.assert_close(p, torch.full_like(p, 1 / 11), rtol=1e-3, atol=0)


@pytest.mark.parametrize("on", BACKENDS)
def test_nan_stays_in_its_row_and_strides(on):
    x, w, b = torch.randn(10, 9)[::2, 1:8], torch.randn(7, 11).T, torch.randn(22)[::2]
    x[3, 2], b[4] = float("nan"), -float("inf")
    with running_on(on):
        p = ft.linear_softmax(x, w, b)
    torch.testing.assert_close(p, torch.softmax(x @ w.T + b, -1), equal_nan=True)
    assert p.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("on", BACKENDS)
def test_transforms(on):
    x, w, b = torch.randn(2, 4, 7), torch.randn(11, 7), torch.randn(11)

    def loss(function):
        return lambda x: function(x, w, b, temperature=0.7).square().sum()

    with running_on(on):
        got = torch.func.vmap(torch.func.grad(loss(ft.linear_softmax)))(x)
    torch.testing.assert_close(got, torch.func.grad(loss(reference.linear_softmax))(x))


def test_compiles_autocast_and_backend():
    x, w, b = torch.randn(4, 7), torch.randn(11, 7), torch.randn(11)
    same_compiled(ft.linear_softmax, x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.linear_softmax(x, w, b).dtype == torch.bfloat16
    assert ft.explain("linear_softmax", x.double(), w.double()).backend == "torch"
    if CPU:
        torch.library.opcheck(torch.ops.fasttransformer.linear_softmax.default, (x, w, b, 0.7))


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3).long()}, TypeError, "input has dtype torch.int64"),
    ({"input": torch.tensor(1.0)}, ValueError, "input has no dimensions"),
    ({"input": torch.ones(2, 4)}, ValueError, "its last dimension must be 3"),
    ({"input": torch.ones(2, 3, 2, 1)}, ValueError, "its last dimension must be 3"),
    ({"weight": torch.ones(5, 3).double()}, TypeError, "weight has dtype torch.float64"),
    ({"weight": torch.ones(3)}, ValueError, "weight has 1 dimensions"),
    ({"bias": torch.ones(3)}, ValueError, "bias has shape (3,)"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be a positive"),
    ({"temperature": float("inf")}, ValueError, "temperature is inf"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.randn(2, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5)}
    refuses("linear_softmax", arguments, change, error, text)
