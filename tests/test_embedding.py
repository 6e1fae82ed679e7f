"""embedding: look-ups and positions, ids out of range in eager and compiled calls, bad input."""

import pytest
import torch
import torch.nn.functional as F
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.backends import backends

BACKENDS = backends_of("embedding")
IDS = torch.tensor([[1, 0, 2], [2, 2, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sinusoidal", [False, True])
@pytest.mark.parametrize("positions", [None, torch.tensor([4, 0, 3]), torch.tensor([[1], [2]])])
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, positions, sinusoidal, dtype):
    options = {"positions": positions, "sinusoidal": sinusoidal, "scale": 3.0, "padding_idx": 0}
    check(
        lambda w, p: ft.embedding(IDS, w, position_weight=p, **options),
        lambda w, p: reference.embedding(IDS, w, position_weight=p, **options),
        [torch.randn(3, 6).to(dtype), torch.randn(5, 6).to(dtype)],
        on=on,
    )


@pytest.mark.parametrize("padding_idx", [0, -1, -10, 9])
@pytest.mark.parametrize("on", BACKENDS)
def test_b61_padding_row_gets_no_gradient(on, padding_idx):
    """pytorch/pytorch#26302: its value is used all the same, and a tied layer still trains it."""
    dtype = torch.float64 if on == "torch" else torch.float32
    weight = torch.randn(10, 5, dtype=dtype, requires_grad=True)
    ids = torch.randint(10, (256, 3, 7))
    with running_on(on):
        out = ft.embedding(ids, weight, padding_idx=padding_idx)
        assert torch.equal(out, weight[ids])
        (gradient,) = torch.autograd.grad(out.sum(), weight)
        expected = torch.bincount(ids.flatten(), minlength=10).to(dtype)
        expected[padding_idx] = 0
        torch.testing.assert_close(gradient, expected[:, None].expand(10, 5))
        tied = ft.embedding(ids, weight, padding_idx=padding_idx).mean((0, 1, 2)) @ weight.T
        (gradient,) = torch.autograd.grad(tied.sum(), weight)
    assert gradient[padding_idx].any()


@pytest.mark.parametrize("on, compiled", [("torch", True), *((on, False) for on in BACKENDS)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [[1, -1], [3], [-(2**31)], [2**31 - 1]], ids=str)
def test_b62_id_out_of_range(bad, dtype, on, compiled):
    """pytorch/pytorch#183608."""
    weight = torch.randn(3, 4)
    function = lambda ids: ft.embedding(ids, weight, padding_idx=-1)  # noqa: E731
    if compiled:
        function = torch.compile(function, fullgraph=True)
    ids = torch.tensor([2, 0], dtype=dtype)
    with running_on(on):
        torch.testing.assert_close(function(ids), weight[[2, 0]])
    with (
        running_on(on, launched=False),
        pytest.raises(ValueError, match=r"embedding: input holds -?\d+; it must be in \[0, 3\)"),
    ):
        function(torch.tensor(bad, dtype=dtype))


@pytest.mark.parametrize("on, compiled", [("torch", True), *((on, False) for on in BACKENDS)])
def test_b62_position_past_the_table(on, compiled):
    """pytorch/pytorch#183608."""
    weight, table = torch.randn(3, 4), torch.randn(5, 4)
    function = lambda ids, at: ft.embedding(ids, weight, positions=at, position_weight=table)  # noqa: E731
    if compiled:
        function = torch.compile(function, fullgraph=True)
    with running_on(on):
        function(IDS, torch.tensor([4, 4, 4]))
    for bad in (-1, 5):
        message = f"embedding: positions holds {bad}"
        with running_on(on, launched=False), pytest.raises(ValueError, match=message):
            function(IDS, torch.tensor([0, 1, bad]))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_b62_no_ids(on, shape):
    """pytorch/pytorch#183608."""
    ids = torch.zeros(shape, dtype=torch.int32)
    weight, table = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with running_on(on, launched=None):
        out = ft.embedding(ids, weight, position_weight=table, sinusoidal=True)
        gradients = torch.autograd.grad(out.sum(), (weight, table))
    assert out.shape == (*shape, 4) and not any(g.any() for g in gradients)


@pytest.mark.parametrize("features", [1, 7, 16, 40, 130, 384])
@pytest.mark.parametrize("on", [on for on in BACKENDS if on != "simt"])
def test_features_around_a_vector_and_strided_tables(on, features):
    ids = torch.randint(9, (3, 20))
    tables = torch.randn(9, features + 3), torch.randn(20, features + 5)
    with running_on(on):
        weight, table = (t.clone().requires_grad_() for t in tables)
        narrow = weight[:, :features], table[:, 2 : features + 2]
        out = ft.embedding(ids, narrow[0], position_weight=narrow[1], sinusoidal=True, scale=0.5)
        got = torch.autograd.grad(out.square().sum(), (weight, table))
    leaves = [t.clone().requires_grad_() for t in tables]
    want = reference.embedding(
        ids,
        leaves[0][:, :features],
        position_weight=leaves[1][:, 2 : features + 2],
        sinusoidal=True,
        scale=0.5,
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), leaves))


@pytest.mark.parametrize("on", [on for on in BACKENDS if on.startswith("cpu")])
def test_gradient_is_the_same_on_any_number_of_threads(on):
    """One id has most of the tokens, so that threads share its row by columns."""
    ids = torch.cat([torch.full((9000,), 3), torch.randint(50, (3000,))])[torch.randperm(12000)]
    weight, cotangent = torch.randn(50, 200, requires_grad=True), torch.randn(12000, 200)
    gradients, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with running_on(on):
                out = ft.embedding(ids, weight, padding_idx=7)
                gradients += torch.autograd.grad(out, weight, cotangent)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    want = torch.zeros(50, 200, dtype=torch.float64).index_add_(0, ids, cotangent.double())
    want[7] = 0
    torch.testing.assert_close(gradients[0].double(), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("on", [on for on in BACKENDS if on.startswith(("cpu", "triton"))])
def test_sinusoid_is_exact_at_far_positions(on):
    positions = torch.tensor([0, 1, 2, 1000, 99_999, 1_000_000, 10**8, -5])
    ids = torch.zeros(8, dtype=torch.int64)
    for features in (64, 7):
        weight = torch.zeros(1, features)
        with running_on(on):
            got = ft.embedding(ids, weight, positions=positions, sinusoidal=True)
        want = reference.embedding(ids, weight.double(), positions=positions, sinusoidal=True)
        assert (got - want).abs().max() <= 1.2e-7


@pytest.mark.skipif(backends()["cpu"] is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 5000])
def test_find_outside(count, dtype):
    find = torch.ops.fasttransformer.find_outside
    ids = torch.randint(7, (count,), dtype=dtype)
    assert find(ids, 7, None) == -1
    for at in {0, count // 2, count - 1} - {-1} if count else ():
        for bad in (-1, 7, -(2**31)):
            wrong = ids.clone()
            wrong[at] = bad
            assert find(wrong, 7, None) == find(wrong, 7, 3) == at
            assert find(wrong, 7, bad) == -1


@pytest.mark.parametrize("on", BACKENDS)
def test_same_ids_are_checked_per_sample_under_vmap(on):
    ids, weight = torch.randint(3, (4, 2, 5)), torch.randn(3, 4)
    with running_on(on):
        got = torch.vmap(lambda i: ft.embedding(i, weight))(ids)
    torch.testing.assert_close(got, F.embedding(ids, weight))


def test_compiles_and_backend():
    same_compiled(
        lambda w, p: ft.embedding(IDS, w, position_weight=p, sinusoidal=True, scale=2.0),
        torch.randn(3, 6), torch.randn(4, 6),
    )  # fmt: skip
    runs_on_the_reference("embedding", IDS, torch.randn(3, 6).double())
    meta = ft.embedding(IDS.to("meta"), torch.randn(3, 6, device="meta"), sinusoidal=True)
    assert meta.shape == (2, 3, 6)


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(3)}, TypeError, "input has dtype torch.float32; it must be an integer"),
    ({"input": torch.ones(3).bool()}, TypeError, "input has dtype torch.bool"),
    ({"input": [1, 2]}, TypeError, "input must be a tensor, got list"),
    ({"weight": torch.ones(3, 4).int()}, TypeError, "weight has dtype torch.int32"),
    ({"weight": torch.ones(3)}, ValueError, "weight has shape (3,)"),
    ({"weight": torch.ones(3, 4, device="meta")}, ValueError, "weight is on meta"),
    ({"padding_idx": 3}, ValueError, "padding_idx is 3; it must be in [-3, 3)"),
    ({"position_weight": torch.ones(5, 4).half()}, TypeError, "position_weight has dtype"),
    ({"position_weight": torch.ones(5, 3)}, ValueError, "position_weight has 3 features, but"),
    ({"position_weight": torch.ones(2, 4)}, ValueError, "input has length 3, but position_weight"),
    ({"positions": torch.arange(3)}, ValueError, "positions are given, but neither"),
    ({"positions": torch.arange(2), "sinusoidal": True}, ValueError, "positions of shape (2,)"),
    ({"positions": torch.rand(3), "sinusoidal": True}, TypeError, "positions has dtype"),
    ({"input": torch.tensor(1), "sinusoidal": True}, ValueError, "input has no dimensions"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    refuses("embedding", {"input": IDS, "weight": torch.randn(3, 4)}, change, error, text)
