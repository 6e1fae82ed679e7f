"""feed_forward: the number contract wherever linear_add runs, and where explain says it runs."""

import functools

import pytest
import torch
from fronts import refuses, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops._front import new_seed
from fasttransformer.reference.feed_forward import GATES
from fasttransformer.reference.linear_add import ACTIVATIONS

BACKENDS = backends_of("feed_forward")
NAMES = ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]


def problem(lead=(9,), c=20, f=33, o=14, activation="gelu", dtype=torch.float32):
    """input, weight_in, bias_in, weight_out, bias_out."""
    width = 2 * f if activation in GATES else f
    return [t.to(dtype) for t in (
        torch.randn(*lead, c), torch.randn(width, c) / c**0.5, torch.randn(width),
        torch.randn(o, f) / f**0.5, torch.randn(o))]  # fmt: skip


def in_steps(x, w_in, b_in, w_out, b_out, activation):
    """Plain PyTorch in the inputs' own dtype, each step rounded."""
    hidden = torch.nn.functional.linear(x, w_in, b_in)
    if activation in GATES:
        gate, up = hidden.chunk(2, -1)
        hidden = ACTIVATIONS[GATES[activation]](gate) * up
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return torch.nn.functional.linear(hidden, w_out, b_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, activation, dtype):
    for lead in ((3,), (2, 9), (200,)):
        draw = functools.partial(problem, lead, activation=activation, dtype=dtype)
        check(
            lambda *args: ft.feed_forward(*args, activation=activation),
            lambda *args: reference.feed_forward(*args, activation=activation),
            draw(),
            on=on,
            peer=lambda *args: in_steps(*args, activation),
            redraw=draw,
        )


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("on", BACKENDS)
def test_without_biases_and_without_rows(on, activation):
    x, w_in, _, w_out, _ = problem(activation=activation)
    with running_on(on):
        out = ft.feed_forward(x, w_in, None, w_out, None, activation=activation)
        empty = ft.feed_forward(x[:0], w_in, None, w_out, None, activation=activation)
    torch.testing.assert_close(out, in_steps(x, w_in, None, w_out, None, activation))
    assert empty.shape == (0, 14)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("on", BACKENDS)
def test_dropout_of_hidden_values(on, activation):
    """The reference's mask, in the backward pass too, whatever runs the activation."""
    inputs = problem(activation=activation)
    torch.manual_seed(5)
    seed = new_seed(torch.device("cpu"))

    def ours(*args):
        torch.manual_seed(5)
        return ft.feed_forward(*args, activation=activation, dropout_p=0.4)

    def wanted(*args):
        return reference.feed_forward(*args, activation=activation, dropout_p=0.4, seed=seed)

    check(ours, wanted, inputs, on=on)
    with running_on(on), torch.no_grad():
        out = ours(*inputs)
    torch.testing.assert_close(out, wanted(*inputs))


def test_explain_tells_where_it_runs():
    inputs = problem()
    assert (
        ft.explain("feed_forward", *inputs).backend == ft.explain("linear_add", *inputs[:3]).backend
    )
    wide = [t.double() for t in inputs]
    assert ft.explain("feed_forward", *wide).backend == "torch"
    with pytest.raises(RuntimeError, match="feed_forward: backend 'cpu' was asked for"):
        ft.feed_forward(*wide, backend="cpu")


def test_compiles_autocast_vmap():
    inputs = problem()
    for activation in ("gelu", "swiglu"):
        same_compiled(lambda *args: ft.feed_forward(*args, activation=activation),  # noqa: B023
                      *problem(activation=activation))  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.feed_forward(*inputs).dtype == torch.bfloat16
    x = torch.randn(3, 5, 20)
    got = torch.vmap(lambda x: ft.feed_forward(x, *inputs[1:]))(x)
    torch.testing.assert_close(got, ft.feed_forward(x, *inputs[1:]))


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3).int()}, TypeError, "input has dtype torch.int32"),
    ({"input": torch.ones(2, 4)}, ValueError, "input has shape (2, 4); weight_in makes its last"),
    ({"weight_in": torch.ones(8)}, ValueError, "weight_in has shape (8,)"),
    ({"weight_in": torch.ones(8, 3).half()}, TypeError, "weight_in has dtype torch.float16"),
    ({"weight_out": torch.ones(5, 7)}, ValueError, "weight_out has in_features 7; weight_in and"),
    ({"activation": "swiglu"}, ValueError, "weight_out has in_features 8; weight_in and swiglu"),
    ({"activation": "geglu", "weight_in": torch.ones(7, 3)}, ValueError, "weight_in has 7 rows"),
    ({"bias_in": torch.ones(3)}, ValueError, "bias_in has shape (3,); it must be (8,)"),
    ({"bias_out": torch.ones(3)}, ValueError, "bias_out has shape (3,); it must be (5,)"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; it must be in [0, 1)"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh'; it must be one of relu"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.ones(2, 3), "weight_in": torch.ones(8, 3), "bias_in": None,
                 "weight_out": torch.ones(5, 8), "bias_out": None}  # fmt: skip
    refuses("feed_forward", arguments, change, error, text)
