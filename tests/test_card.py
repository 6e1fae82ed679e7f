"""What carries a test's CPU tensors to a GPU (card.py), without a GPU: the "device" is the CPU and
the operators are simt's, so that every number and layout can be compared."""

from __future__ import annotations

import card
import launches
import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)


def strided():
    x = torch.randn(4, 9, 40)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 1),
        "an offset": x[1:, 2:, 3:35],
        "steps": x[:, ::2, ::3],
        "expanded": x[:1, :, :1].expand(4, 9, 40),
        "empty": x[:0],
        "bfloat16": x.bfloat16()[..., 1:],
    }


@pytest.mark.parametrize("layout", strided())
def test_a_tensor_arrives_as_it_lies(layout):
    x = strided()[layout]
    there = card.moved(x, "cpu", {})
    assert torch.equal(there, x) and there.dtype == x.dtype
    assert (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
    assert x.numel() == 0 or there.data_ptr() != x.data_ptr()
    there_bytes, here_bytes = (t.untyped_storage().nbytes() for t in (there, x))
    assert there_bytes == here_bytes


def test_tensors_of_one_storage_share_one_there():
    x, known = torch.randn(6, 8), {}
    first, second = (card.moved(t, "cpu", known) for t in (x[:3], x[2:]))
    first.fill_(7.0)
    assert (second[0] == 7.0).all() and not (second[1:] == 7.0).any() and not (x == 7.0).any()


@pytest.mark.parametrize("layout", [name for name in strided() if name != "empty"])
def test_results_and_gradients_are_those_of_the_operators(layout):
    x = strided()[layout].detach().requires_grad_()

    def run():
        out = ft.softmax(x, scale=0.7)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    with simt.running():
        want = run()
        with launches.recorded() as launched, card.rehearsed():
            got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    launched.require("simt", "softmax", backward=True)


def test_a_composed_operation_and_several_tensors():
    q, k, v = (torch.randn(2, 5, 3, 16).transpose(1, 2) for _ in "qkv")
    bias = torch.randn(3, 1, 1).expand(3, 5, 5)
    x, w_in, w_out = torch.randn(7, 8), torch.randn(12, 8), torch.randn(8, 12)

    def run():
        out, lse = ft.attention(q, k, v, bias=bias, return_lse=True)
        return out, lse, ft.feed_forward(x, w_in, None, w_out, None)

    with simt.running():
        want = run()
        with launches.recorded() as launched, card.rehearsed():
            got = run()
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want))
    for op in ("attention", "feed_forward"):
        launched.require("simt", op, backward=False)


def test_what_an_operator_writes_comes_back():
    library = torch.library.Library("fasttransformer_card_test", "DEF")
    library.define("fill(Tensor(a!) x, float value) -> Tensor")

    def fill(x, value):
        x.fill_(value)
        return x.sum()

    library.impl("fill", fill, "CPU")
    wide = torch.zeros(4, 6)
    total = card.bridge(torch.ops.fasttransformer_card_test.fill.default, "cpu")(wide[:, 1:3], 2.0)
    assert total == 16.0 and (wide[:, 1:3] == 2.0).all() and wide.sum() == 16.0


def test_outside_of_it_nothing_has_changed():
    before = ft.backends()["cuda"]
    with simt.running(), card.rehearsed():
        assert ft.backends()["cuda"] is None
    assert ft.backends()["cuda"] == before


@pytest.mark.skipif(ft.backends()["triton"] is not None, reason="no Triton")
def test_checks_of_numbers_hand_over_cpu_tensors_where_there_is_a_gpu(monkeypatch):
    """So that tensors that a test holds by itself (a mask, targets) are on the same device."""

    class Stop(Exception):
        pass

    def ours(x):
        assert x.device.type == "cpu"
        assert ft.explain("softmax", x).backend == "triton"
        raise Stop

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(Stop):
        on = contract.On("triton", "softmax")
        contract.check(ours, reference.softmax, [torch.randn(5, 40)], on=on)
