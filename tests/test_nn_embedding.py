"""ft.nn.Embedding against torch's over every flag of the constructor."""

import itertools

import modules
import pytest
import torch
from torch import nn

import fasttransformer as ft

FLAGS = [
    dict(zip(("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"), values, strict=True))
    for values in itertools.product((None, 0, -1), (None, 1.0), (False, True), (False, True))
    if not (values[2] and values[3])  # torch has no gradient for both
]


def reason_of(flags):
    if flags["max_norm"] is not None:
        return "max_norm, which renormalizes rows in place"
    if flags["scale_grad_by_freq"]:
        return "scale_grad_by_freq"
    return "sparse gradients" if flags["sparse"] else None


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_against_torch(flags, dtype, ids_dtype):
    theirs = nn.Embedding(10, 5, **flags).to(dtype)
    nn.init.normal_(theirs.weight, std=2.0)  # the padding row too, and rows longer than max_norm
    ours = modules.ours_of(theirs)
    shapes = [(7,), (3, 4), (0,), (2, 3, 4)]
    for shape in shapes if flags["sparse"] else [*shapes, ()]:  # torch's sparse one fails on ()
        ids = torch.randint(10, shape, dtype=ids_dtype)
        out, want = ours(ids), theirs(ids)
        assert torch.equal(out, want) and out.dtype == dtype
        assert torch.equal(ours.weight, theirs.weight)  # max_norm writes to it
        cotangent = torch.randn(out.shape).to(dtype)
        (got,) = torch.autograd.grad(out, ours.weight, cotangent)
        (want,) = torch.autograd.grad(want, theirs.weight, cotangent)
        assert got.is_sparse == want.is_sparse == flags["sparse"]
        got, want = (g.coalesce().to_dense() if g.is_sparse else g for g in (got, want))
        if dtype == torch.bfloat16:  # torch rounds each partial sum
            torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
        else:
            assert torch.equal(got, want)
    reason = reason_of(flags)
    assert ft.nn.fallbacks(ours) == (
        {} if reason is None else {"": {reason: 4 + (not flags["sparse"])}}
    )


def test_b61_padding_and_tied_weights():
    """pytorch/pytorch#26302: ids (256, 3, 7); given weights; a tied output layer."""
    table = ft.nn.Embedding(10, 5, padding_idx=0)
    ids = torch.randint(10, (256, 3, 7))
    table(ids).double().sum().backward()
    counts = torch.bincount(ids.flatten(), minlength=10)
    assert table.weight.grad[0].eq(0).all()
    assert table.weight.grad[1:, 0].tolist() == counts[1:].tolist()
    weight = torch.randn(10, 5)
    table = ft.nn.Embedding.from_pretrained(weight, padding_idx=-1, freeze=False)
    assert type(table) is ft.nn.Embedding and table.padding_idx == 9
    assert torch.equal(table(torch.tensor([9, 1])), weight[[9, 1]])  # its value is not forced to 0
    out = table(torch.tensor([9, 1]))
    out.sum().backward()
    assert table.weight.grad[9].eq(0).all() and table.weight.grad[1].eq(1).all()
    head = nn.Linear(5, 10, bias=False)
    head.weight = table.weight
    table.zero_grad()
    head(table(torch.tensor([9, 1]))).sum().backward()
    assert table.weight.grad[9].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_b62_ids_out_of_range(compiled):
    """pytorch/pytorch#183608: checked in eager, read anyway when compiled."""
    table = ft.nn.Embedding(3, 4, padding_idx=-1)
    function = torch.compile(table, fullgraph=True) if compiled else table
    for ids in (torch.tensor([0, 2]), torch.tensor([0, 2], dtype=torch.int32)):
        assert torch.equal(function(ids), table.weight[[0, 2]])
    assert function(torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    for bad in ([1, -1], [3]):
        with pytest.raises(ValueError, match=r"input holds -?\d; it must be in \[0, 3\)"):
            function(torch.tensor(bad))


def test_a_table_that_is_no_float_is_torchs():
    table = ft.nn.Embedding.from_pretrained(torch.arange(6).view(3, 2).to(torch.complex64))
    assert torch.equal(table(torch.tensor([2])), table.weight[[2]])
    assert ft.nn.fallbacks(table) == {"": {"weight has dtype torch.complex64": 1}}


def test_transforms_and_meta():
    table = ft.nn.Embedding(10, 5)
    ids = torch.randint(10, (4, 3))
    assert torch.equal(torch.vmap(table)(ids), table(ids))
    assert table.to("meta")(ids.to("meta")).shape == (4, 3, 5)


def test_export():
    table = ft.nn.Embedding(10, 5)
    ids = torch.randint(10, (4, 3))
    exported = torch.export.export(table, (ids,)).module()
    assert torch.equal(exported(ids), table(ids))
