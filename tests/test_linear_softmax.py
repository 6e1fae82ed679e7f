"""linear_softmax: the number contract, autocast, bad input."""

import pytest
import torch
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import check
from fasttransformer import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_contract(lead, temperature, dtype):
    inputs = (torch.randn(*lead, 7), torch.randn(11, 7), torch.randn(11))
    check(
        lambda *args: ft.linear_softmax(*args, temperature=temperature),
        lambda *args: reference.linear_softmax(*args, temperature=temperature),
        [t.to(dtype) for t in inputs],
    )


def test_rows_sum_to_one_whatever_the_temperature():
    x, w = torch.randn(4, 7) * 30, torch.randn(11, 7)
    for temperature in (1e-3, 1.0, 1e6):
        p = ft.linear_softmax(x, w, temperature=temperature)
        torch.testing.assert_close(p.sum(-1), torch.ones(4))
    torch.testing.assert_close(p, torch.full_like(p, 1 / 11), rtol=1e-3, atol=0)


def test_compiles_autocast_and_backend():
    x, w, b = torch.randn(4, 7), torch.randn(11, 7), torch.randn(11)
    same_compiled(ft.linear_softmax, x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.linear_softmax(x, w, b).dtype == torch.bfloat16
    runs_on_the_reference("linear_softmax", x, w, b)


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
