"""rotary_embedding: per-sample angles, inputs left alone, positions out of range, bad input."""

import pytest
import torch
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference

BACKENDS = backends_of("rotary_embedding")
B, S, D = 2, 5, 8
IDS = torch.stack([torch.arange(5), torch.arange(3, 8)])


def problem(dtype=torch.float32):
    return torch.randn(B, 4, S, D).to(dtype), torch.randn(B, 2, S, D).to(dtype)


def tables(positions=9, leading=()):
    angle = torch.rand(*leading, positions, D // 2) * 6
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (B,)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, leading, interleaved, dtype):
    options = {"interleaved": interleaved, "position_ids": IDS}
    cos, sin = tables(leading=leading)
    check(
        lambda *args: ft.rotary_embedding(*args, cos, sin, **options),
        lambda *args: reference.rotary_embedding(*args, cos, sin, **options),
        problem(dtype),
        on=on,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 34, 66, 128])
@pytest.mark.parametrize("on", [on for on in BACKENDS if on.startswith("cpu")])
def test_head_sizes_around_a_vector_and_strides(on, head_dim, dtype):
    """As a projection leaves query and key, of more tokens than a tile; full and 16-bit tables."""
    query, key = (torch.randn(2, 19, h, head_dim).to(dtype).transpose(1, 2) for h in (3, 1))
    angle = torch.rand(19, head_dim // 2) * 6
    wide = torch.cat([angle, angle], -1)
    for table, interleaved in ((angle, True), (angle.to(dtype), False), (wide, False)):
        options = {"interleaved": interleaved}
        check(
            lambda *args: ft.rotary_embedding(*args, table.cos(), table.sin(), **options),  # noqa: B023
            lambda *args: reference.rotary_embedding(*args, table.cos(), table.sin(), **options),  # noqa: B023
            [query, key],
            on=on,
        )


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_nothing_to_turn(on, shape):
    table, key = torch.ones(5, 2), torch.randn(shape[0], 1, *shape[2:], requires_grad=True)
    with running_on(on, launched=None):
        outs = ft.rotary_embedding(torch.zeros(shape), key, table, 0 * table)
        (gradient,) = torch.autograd.grad(outs[1].sum(), key)
    assert outs[0].shape == shape and torch.equal(outs[1], key)
    assert torch.equal(gradient, torch.ones_like(key))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_the_tables(interleaved):
    """The reference alone has them, so a trained table runs there."""
    options = {"interleaved": interleaved, "position_ids": IDS}
    check(
        lambda *args: ft.rotary_embedding(*args, **options),
        lambda *args: reference.rotary_embedding(*args, **options),
        [*problem(), *tables(leading=(B,))],
    )
    query, key = problem()
    cos, sin = (t.requires_grad_() for t in tables())
    if "simt" in BACKENDS:
        message = "no table_grad in this kernel"
        with running_on("simt", launched=False), pytest.raises(RuntimeError, match=message):
            ft.rotary_embedding(query, key, cos, sin)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("on", BACKENDS)
def test_b64_each_sample_has_its_own_angles(on, interleaved):
    """Liger-Kernel PR #477: every sample alone gives the same; nothing is modified; lengths are
    kept; the backward turns back."""
    dtype = torch.float64 if on == "torch" else torch.float32
    q, k = (x.to(dtype) for x in problem())
    base = torch.rand(S, D // 2, dtype=dtype) * 6
    per_sample = torch.stack([base, base + 1])
    expanded = base.expand(B, S, D // 2)
    with running_on(on):
        for angle in (per_sample, expanded, base[None]):
            cos, sin = angle.cos(), angle.sin()
            if angle is expanded:
                cos, sin = base.cos().expand(B, S, -1), base.sin().expand(B, S, -1)
            before = [x.clone() for x in (q, k, cos, sin)]
            leaf = q.clone().requires_grad_()
            turned, turned_key = ft.rotary_embedding(leaf, k, cos, sin, interleaved=interleaved)
            for x, y in zip((q, k, cos, sin), before):
                assert torch.equal(x, y)
            for b in range(B):
                row = min(b, cos.shape[0] - 1)
                alone = ft.rotary_embedding(
                    q[b : b + 1], k[b : b + 1], cos[row], sin[row], interleaved=interleaved
                )
                torch.testing.assert_close(turned[b : b + 1], alone[0])
                torch.testing.assert_close(turned_key[b : b + 1], alone[1])
            weights = torch.randn_like(q)
            (gradient,) = torch.autograd.grad((turned * weights).sum(), leaf)
            back = ft.rotary_embedding(weights, k, cos, -sin, interleaved=interleaved)[0]
            torch.testing.assert_close(gradient, back)
            pairs = (-1, 2) if interleaved else (2, -1)
            length = lambda x: x.unflatten(-1, pairs).square().sum(-1 if interleaved else -2)  # noqa: B023, E731
            torch.testing.assert_close(length(turned), length(q))


@pytest.mark.parametrize("on", BACKENDS)
def test_b64_half_split_tables_are_refused_for_interleaved_pairs(on):
    """Tongjilibo/bert4torch#1: tables of twice the angles only make sense for half-split pairs."""
    q, k = problem()
    cos, sin = (torch.cat([t, t], -1) for t in tables())
    with running_on(on):
        wide = ft.rotary_embedding(q, k, cos, sin)
        torch.testing.assert_close(wide, ft.rotary_embedding(q, k, cos[:, :4], sin[:, :4]))
    with pytest.raises(ValueError, match="width 8; head_dim 8 makes it 4, interleaved"):
        ft.rotary_embedding(q, k, cos, sin, interleaved=True)


@pytest.mark.parametrize("on, compiled", [("torch", True), *((on, False) for on in BACKENDS)])
def test_b62_position_past_the_tables(on, compiled):
    """pytorch/pytorch#183608."""
    function = (
        torch.compile(ft.rotary_embedding, fullgraph=True) if compiled else ft.rotary_embedding
    )
    q, k = problem()
    cos, sin = tables()
    with running_on(on):
        function(q, k, cos, sin, position_ids=torch.tensor([0, 8, 8, 1, 2]))
    for bad in (-1, 9):
        message = f"position_ids holds {bad}"
        with running_on(on, launched=False), pytest.raises(ValueError, match=message):
            function(q, k, cos, sin, position_ids=torch.tensor([0, 8, bad, 1, 2]))


def test_compiles_autocast_and_backend():
    q, k = problem()
    cos, sin = tables()
    same_compiled(lambda q, k: ft.rotary_embedding(q, k, cos, sin, position_ids=IDS), q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.rotary_embedding(q, k, cos, sin)[0].dtype == torch.float32
    runs_on_the_reference("rotary_embedding", q.double(), k.double(), cos, sin)


@pytest.mark.parametrize("change, error, text", [
    ({"query": torch.ones(B, 4, S, D).int()}, TypeError, "query has dtype torch.int32"),
    ({"query": torch.ones(4, S, D)}, ValueError, "query has shape (4, 5, 8); it must have 4"),
    ({"key": torch.ones(B, 2, S, D).half()}, TypeError, "key has dtype torch.float16"),
    ({"key": torch.ones(B, 2, S + 1, D)}, ValueError, "only their numbers of heads may differ"),
    ({"cos": torch.ones(9, 3)}, ValueError, "cos has shape (9, 3), but sin has (9, 4)"),
    ({"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, ValueError, "have 4 positions, but query"),
    ({"cos": torch.ones(3, 9, 4), "sin": torch.ones(3, 9, 4)}, ValueError, "batch 1 or 2"),
    ({"position_ids": torch.zeros(S)}, TypeError, "position_ids has dtype torch.float32"),
    ({"position_ids": torch.zeros(3, S).int()}, ValueError, "position_ids has shape (3, 5)"),
    ({"position_ids": torch.full((S,), 9)}, ValueError, "position_ids holds 9"),
    ({"cos": torch.ones(9, 4, device="meta")}, ValueError, "cos is on meta"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    query, key = problem()
    cos, sin = tables()
    arguments = {"query": query, "key": key, "cos": cos, "sin": sin}
    refuses("rotary_embedding", arguments, change, error, text)


def test_odd_head_size():
    q = torch.randn(1, 1, 2, 7)
    with pytest.raises(ValueError, match="head_dim 7; it must be even"):
        ft.rotary_embedding(q, q, torch.ones(2, 3), torch.ones(2, 3))
