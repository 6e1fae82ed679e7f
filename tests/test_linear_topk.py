"""linear_topk: equals softmax and a stable sort, pieces of rows, bad input."""

import pytest
import torch
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from fasttransformer.ops import _output_layer


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("k", [0, 1, 4, 11])
def test_equals_the_sorted_softmax(monkeypatch, k, lead, pieces):
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 25)  # two rows
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(11, dtype=torch.float64)
    values, indices = ft.linear_topk(x, w, b, k=k, temperature=0.7)
    p = torch.softmax((x @ w.T + b) / 0.7, -1)
    want = p.sort(-1, descending=True)
    torch.testing.assert_close(values, want.values[..., :k])
    assert torch.equal(indices, want.indices[..., :k])
    weights = torch.rand_like(values)
    got = torch.autograd.grad((values * weights).sum(), (x, w))
    expected = torch.autograd.grad((want.values[..., :k] * weights).sum(), (x, w))
    torch.testing.assert_close(got, expected)


def test_of_equal_logits_the_lower_index_comes_first():
    _, indices = ft.linear_topk(torch.ones(3, 1), torch.ones(9, 1), k=4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3


def test_dtypes_compile_autocast_backend():
    x, w = torch.randn(4, 7), torch.randn(11, 7)
    values, indices = ft.linear_topk(x.bfloat16(), w.bfloat16(), k=3)
    assert values.dtype == torch.bfloat16 and indices.dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.linear_topk(x, w, k=3)[0].dtype == torch.bfloat16
    same_compiled(lambda x, w: ft.linear_topk(x, w, k=3)[0], x, w)
    runs_on_the_reference("linear_topk", x, w, k=3)


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
