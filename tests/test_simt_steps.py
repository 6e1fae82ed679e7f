"""CUDA kernels of cross_entropy, embedding, rotary_embedding and feed_forward's activations, run by
simt: sizes at the edges of their layouts, cut-short grids, alignment, int32 ids, empty tensors, ids
out of range, results that repeat bit by bit."""

from __future__ import annotations

import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.backends import STEPS
from fasttransformer.ops._activation import activation
from fasttransformer.reference.feed_forward import GATES
from fasttransformer.reference.linear_add import ACTIVATIONS

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))


@pytest.fixture
def operators():
    simt.load()
    return torch.ops.fasttransformer_simt


def shifted(x: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The same numbers ``by`` elements behind an aligned address, with a gap between rows."""
    room = torch.zeros(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)
    room[..., by : by + x.shape[-1]] = x
    return room[..., by : by + x.shape[-1]]


# ---- activations --------------------------------------------------------------------------------


def plain(x, name):
    if name in GATES:
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[GATES[name]](gate) * up
    return ACTIVATIONS[name](x)


@dtypes
@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 66), (5, 48), (1300, 16)], ids=str)
def test_activation(shape, name, dtype):
    with simt.limits(grid=3):
        contract.check(
            lambda x: activation(x, name, STEPS["activation"]["cuda"]),
            lambda x: plain(x, name),
            [(3 * torch.randn(shape)).to(dtype)],
            on="simt",
        )


@dtypes
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("features", [16, 22])
def test_activation_of_rows_at_any_address(operators, features, name, dtype):
    x, grad = torch.randn(4, features).to(dtype), torch.randn(4, features).to(dtype)
    grad = grad[:, : features // 2] if name in GATES else grad
    out = operators.activation(x, name)
    assert torch.equal(operators.activation(shifted(x), name), out)
    got = operators.activation_backward(shifted(grad), shifted(x, 3), name)
    assert torch.equal(got, operators.activation_backward(grad.contiguous(), x, name))


def test_activation_empty_and_special(operators):
    assert operators.activation(torch.zeros(0, 8), "swiglu").shape == (0, 4)
    assert operators.activation_backward(torch.zeros(3, 0), torch.zeros(3, 0), "geglu").shape == (
        3,
        0,
    )
    x = torch.tensor([float("nan"), -200.0, 200.0, 0.0])
    for name in ACTIVATIONS:
        out = operators.activation(x, name)
        torch.testing.assert_close(out, plain(x, name), equal_nan=True)
        ones = torch.ones(4)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(plain(leaf, name).sum(), leaf)
        got = operators.activation_backward(ones, x, name)
        torch.testing.assert_close(got[1:], want[1:])
