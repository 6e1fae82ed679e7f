"""CUDA kernels of cross_entropy, embedding, rotary_embedding and feed_forward's activations, run by
simt: sizes at the edges of their layouts, cut-short grids, alignment, int32 ids, empty tensors, ids
out of range, results that repeat bit by bit."""

from __future__ import annotations

import math

import card
import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.backends import STEPS
from fasttransformer.ops._activation import CODES, activation
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


# ---- cross entropy ------------------------------------------------------------------------------

# Under one chunk, at the edges of a plan's groups, odd, and of more than one batch a thread.
CLASSES = (1, 7, 8, 9, 64, 77, 250, 1000, 2049, 8193)


def loss_check(x, target, limits=None, **options):
    with simt.limits(**(limits or {})):
        contract.check(
            lambda x: ft.cross_entropy(x, target, **options),
            lambda x: reference.cross_entropy(x, target, **options),
            [x],
            on="simt",
        )


def targets_of(rows, classes):
    target = torch.randint(classes, (rows,))
    target[1::3] = -100
    return target


@dtypes
@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy_classes(classes, dtype):
    x = (3 * torch.randn(4, classes)).to(dtype)
    for label_smoothing, weight in ((0.0, None), (0.1, None), (0.1, torch.rand(classes))):
        loss_check(x, targets_of(4, classes), reduction="none", weight=weight,
                   label_smoothing=label_smoothing)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_262144_classes(dtype):
    x = torch.randn(2, 262144).to(dtype)
    loss_check(x, torch.tensor([262143, 0]), label_smoothing=0.1, reduction="sum")


@dtypes
@pytest.mark.parametrize("classes", [5, 300])
def test_cross_entropy_cut_short_grid(classes, dtype):
    x = torch.randn(300 if classes == 5 else 20, classes).to(dtype)
    loss_check(x, targets_of(len(x), classes), {"grid": 1})


@dtypes
@pytest.mark.parametrize("classes", [6, 77, 1000])
def test_cross_entropy_of_rows_at_any_address(operators, classes, dtype):
    x, target = torch.randn(3, classes).to(dtype), torch.randint(classes, (3,))
    losses, statistics = operators.cross_entropy(x, target, None, -100, 0.1)
    grad = torch.randn(3)
    d_input = operators.cross_entropy_backward(grad, x, target, None, statistics, -100, 0.1)
    for by in (1, 3):
        got, _ = operators.cross_entropy(shifted(x, by), target, None, -100, 0.1)
        torch.testing.assert_close(got, losses)
        args = (shifted(x, by), target, None, statistics, -100, 0.1)
        assert torch.equal(operators.cross_entropy_backward(grad, *args), d_input)
    row = x[:1].expand(3, classes)
    one = operators.cross_entropy(row, target[:1].expand(3).contiguous(), None, -100, 0.1)[0]
    assert torch.equal(one, losses[:1].expand(3))
    every = torch.ones(()).expand(3)  # what a sum's gradient is: no stride
    got = operators.cross_entropy_backward(every, x, target, None, statistics, -100, 0.1)
    want = operators.cross_entropy_backward(torch.ones(3), x, target, None, statistics, -100, 0.1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("weight", [None, torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_weights_of_other_dtypes(weight):
    weight = None if weight is None else torch.rand(9).to(weight)
    loss_check(torch.randn(5, 9).half(), targets_of(5, 9), weight=weight, label_smoothing=0.2)


def test_cross_entropy_int32_targets_and_no_rows(operators):
    x, target = torch.randn(3, 9), torch.tensor([8, -100, 0])
    both = [operators.cross_entropy(x, t, None, -100, 0.0) for t in (target, target.int())]
    assert all(torch.equal(a, b) for a, b in zip(*both))
    losses, statistics = operators.cross_entropy(x[:0], target[:0], None, -100, 0.0)
    assert losses.shape == (0,) and statistics.shape == (0, 4)
    none = operators.cross_entropy_backward(losses, x[:0], target[:0], None, statistics, -100, 0.0)
    assert none.shape == (0, 9)
    with contract.running_on("simt", launched=False):
        assert ft.cross_entropy(x[:0], target[:0]).isnan()


@pytest.mark.parametrize("bad", [-1, 9, -(2**31), 2**31 - 1])
def test_cross_entropy_target_out_of_range(operators, bad):
    """The front looks at ids in the CPU's memory; on a GPU the kernels do."""
    x, target = torch.randn(3, 9), torch.tensor([0, bad, 8])
    with pytest.raises(RuntimeError, match=r"cross_entropy.*a target is out of range"):
        operators.cross_entropy(x, target, None, -100, 0.0)
    statistics = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"cross_entropy_backward.*a target is out of range"):
        operators.cross_entropy_backward(torch.ones(3), x, target, None, statistics, -100, 0.0)
    operators.cross_entropy(x, target, None, bad, 0.0)


@pytest.mark.parametrize("classes", [9, 3000])
def test_cross_entropy_nan_and_infinities(classes):
    x = torch.randn(6, classes)
    x[0] = math.nan  # left out: not read
    x[1, 3] = math.nan
    x[2, 4] = -math.inf
    x[3] = -math.inf
    x[4, 5] = math.inf
    target = torch.tensor([-100, 0, 4, 0, 0, 1])
    x.requires_grad_()
    with contract.running_on("simt"):
        losses = ft.cross_entropy(x, target, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses[0] == 0 and losses[2] == math.inf and losses[5].isfinite()
    assert losses[[1, 3, 4]].isnan().all()
    assert not gradient[0].any() and gradient[[2, 5]].isfinite().all()


def test_cross_entropy_large_logits():
    """The maximum is kept apart from the logarithm: their sum would lose a thousandth here."""
    for classes in (1, 5, 300):
        for centre in (1e4, -1e4):  # far below 0, a thread without a class must add 0
            x = centre + torch.randn(5, classes)
            for label_smoothing in (0.0, 0.5):
                options = {"label_smoothing": label_smoothing, "reduction": "none"}
                loss_check(x, targets_of(5, classes), **options)


def test_cross_entropy_repeats_bit_by_bit(operators):
    x, target = torch.randn(40, 999).bfloat16(), torch.randint(999, (40,))
    first = operators.cross_entropy(x, target, None, -100, 0.1)
    with simt.limits(grid=3):
        again = operators.cross_entropy(x, target, None, -100, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# ---- embedding ----------------------------------------------------------------------------------


def embedding_check(ids, weight, table=None, limits=None, **options):
    with simt.limits(**(limits or {})):
        contract.check(
            lambda w, p: ft.embedding(ids, w, position_weight=p, **options),
            lambda w, p: reference.embedding(ids, w, position_weight=p, **options),
            [weight, table],
            on="simt",
        )


@dtypes
@pytest.mark.parametrize("features", [1, 6, 7, 8, 66, 520, 2100])
def test_embedding_features(features, dtype):
    weight, table = (torch.randn(n, features).to(dtype) for n in (5, 9))
    embedding_check(torch.randint(5, (3, 9)), weight, table, sinusoidal=True, scale=2.5)


@dtypes
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65, 500])
@pytest.mark.parametrize("rows", [1, 2, 40, 1000])
def test_embedding_gradient_tiles(rows, tokens, dtype):
    """Ids inside a tile, over its ends, and over many tiles; rows without an id."""
    weight = torch.randn(rows, 12).to(dtype)
    embedding_check(torch.randint(rows, (tokens,)), weight, scale=0.5)
    embedding_check(torch.randint(rows, (tokens,)), weight, limits={"grid": 1}, padding_idx=-1)


def test_embedding_padding_between_others():
    ids = torch.tensor([3] * 40 + [1] * 70 + [0] * 5 + [2] * 30)[torch.randperm(145)]
    for padding_idx in range(4):
        embedding_check(ids, torch.randn(5, 8), padding_idx=padding_idx)


def test_embedding_sinusoid_is_exact_at_far_positions():
    positions = torch.tensor([0, 1, 2, 1000, 99_999, 1_000_000, 2**31 + 7])
    for features in (64, 7):
        weight = torch.zeros(1, features)
        ids = torch.zeros(7, dtype=torch.int64)
        with contract.running_on("simt"):
            got = ft.embedding(ids, weight, positions=positions, sinusoidal=True)
        want = reference.embedding(ids, weight.double(), positions=positions, sinusoidal=True)
        allowed = torch.full((7, 1), 1.2e-7, dtype=torch.float64)
        allowed[-1] = 1e-6  # there the reference's own angles are off by this
        assert ((got - want).abs() <= allowed).all()


@dtypes
def test_embedding_tables_at_any_address_and_int32_ids(operators, dtype):
    weight, table = (torch.randn(n, 24).to(dtype) for n in (5, 9))
    ids, positions = torch.randint(5, (2, 9)), torch.randint(9, (9,))
    want = operators.embedding(ids, weight, positions, table, True, 2.0)
    args = ids.int(), shifted(weight), positions.int(), shifted(table, 3)
    assert torch.equal(operators.embedding(*args, True, 2.0), want)
    grad = torch.randn(18, 24).to(dtype)
    order = ids.view(-1).sort(stable=True)
    want = operators.embedding_backward(grad, *order, 5, 2.0, -1)
    got = operators.embedding_backward(shifted(grad), order[0].int(), order[1], 5, 2.0, -1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**40)])
def test_embedding_id_and_position_out_of_range(operators, bad):
    weight, table = torch.randn(5, 8), torch.randn(5, 8)
    ids, fine = torch.tensor([0, bad, 4]), torch.tensor([0, 1, 4])
    with pytest.raises(RuntimeError, match=r"embedding.*an id is out of range"):
        operators.embedding(ids, weight, None, None, False, 1.0)
    with pytest.raises(RuntimeError, match=r"embedding.*a position is out of range"):
        operators.embedding(fine, weight, ids, table, False, 1.0)
    with pytest.raises(RuntimeError, match=r"embedding_backward.*an id is out of range"):
        operators.embedding_backward(torch.ones(3, 8), *ids.sort(), 5, 1.0, 0)


def test_embedding_repeats_bit_by_bit(operators):
    ids = torch.randint(3, (700,)).sort(stable=True)
    grad = torch.randn(700, 40)
    first = operators.embedding_backward(grad, *ids, 3, 1.0, -1)
    with simt.limits(grid=2):
        assert torch.equal(operators.embedding_backward(grad, *ids, 3, 1.0, -1), first)


# ---- rotary embedding ---------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 130])
def test_rotary_head_dims(head_dim, interleaved, dtype):
    query, key = (torch.randn(2, h, 5, head_dim).to(dtype) for h in (7, 2))
    angle = 6 * torch.rand(2, 9, head_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    if not interleaved:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    positions = torch.randint(9, (2, 5)).int()
    options = {"interleaved": interleaved, "position_ids": positions}
    for limits in ({}, {"grid": 1}):
        with simt.limits(**limits):
            contract.check(
                lambda *args: ft.rotary_embedding(*args, cos, sin, **options),
                lambda *args: reference.rotary_embedding(*args, cos, sin, **options),
                [query, key],
                on="simt",
            )


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_any_strides_and_alignment(operators, interleaved, dtype):
    query, key = (torch.randn(2, h, 5, 32).to(dtype) for h in (3, 1))
    angle = 6 * torch.rand(5, 16)
    cos, sin = angle.cos(), angle.sin().to(dtype)
    want = operators.rotary_embedding(query, key, cos, sin, interleaved, None)
    per_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key)]
    tables = shifted(cos).expand(2, 5, 16), sin.expand(2, 5, 16)
    for q, k in (per_head, (shifted(query), shifted(key, 2))):
        got = operators.rotary_embedding(q, k, *tables, interleaved, None)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        back = operators.rotary_embedding_backward(q, k, cos, sin, interleaved, None)
        turned = operators.rotary_embedding(query, key, cos, -sin, interleaved, None)
        assert all(torch.equal(a, b) for a, b in zip(back, turned))


def test_rotary_out_of_range_and_empty(operators):
    query, key, angle = torch.randn(1, 2, 3, 8), torch.randn(1, 0, 3, 8), torch.rand(4, 4)
    for bad in (-1, 4, 2**40):
        ids = torch.tensor([[0, bad, 1]])
        with pytest.raises(RuntimeError, match=r"rotary_embedding.*a position is out of range"):
            operators.rotary_embedding(query, key, angle.cos(), angle.sin(), False, ids)
    out = operators.rotary_embedding(query, key, angle.cos(), angle.sin(), False, None)
    assert [t.shape for t in out] == [query.shape, key.shape]
    empty = query[:, :, :0], key[:, :, :0]
    out = operators.rotary_embedding(*empty, angle.cos(), angle.sin(), True, None)
    assert out[0].shape == (1, 2, 0, 8)


# ---- offsets past 2^31 ---------------------------------------------------------------------------
# Memory that nobody touches costs none: only the last rows of these tensors are written or read.


def test_b59_cross_entropy_past_two_to_the_31(operators):
    """pytorch/pytorch#85786: rows that are left out are not read, the last one is."""
    rows, classes = 2**12 + 2, 2**19
    x = torch.empty(rows, classes, dtype=torch.bfloat16)
    x[-1] = torch.randn(classes)
    target = torch.full((rows,), -100)
    target[-1] = classes - 1
    losses, statistics = operators.cross_entropy(x, target, None, -100, 0.0)
    want = torch.nn.functional.cross_entropy(x[-1].float(), target[-1])
    torch.testing.assert_close(losses[-1], want)
    assert not losses[:-1].any()
    far = x.as_strided((2, 64), (x.numel() - 64, 1))  # one row at each end
    far[0] = torch.randn(64)
    args = torch.tensor([3, 63]), None
    _, statistics = operators.cross_entropy(far, *args, -100, 0.0)
    got = operators.cross_entropy_backward(torch.ones(2), far, *args, statistics, -100, 0.0)
    near = operators.cross_entropy_backward(
        torch.ones(2), far.contiguous(), *args, statistics, -100, 0.0
    )
    assert torch.equal(got, near)


def test_embedding_and_rotary_past_two_to_the_31(operators):
    weight = torch.empty(2**21 + 2, 1024, dtype=torch.bfloat16)
    ends = torch.tensor([0, 2**21 + 1])
    weight[ends] = torch.randn(2, 1024).bfloat16()
    out = operators.embedding(ends, weight, None, None, False, 1.0)
    assert torch.equal(out, weight[ends])
    far = weight.view(-1).as_strided((1, 2, 1, 64), (0, weight.numel() - 64, 64, 1))
    angle = torch.rand(1, 32)
    got = operators.rotary_embedding(far, far, angle, angle, True, None)
    near = far.contiguous()
    want = operators.rotary_embedding(near, near, angle, angle, True, None)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# ---- compiled, transformed ----------------------------------------------------------------------

STEPPED = ("cross_entropy", "embedding", "rotary_embedding", "activation", "linear_add")


ignore_overriding = pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")


@pytest.fixture
def registered(monkeypatch, operators):
    """simt's kernels as the package's own operators on CPU tensors, with all that is registered for
    those: fake kernels and vmap rules."""
    if card.REHEARSED:
        pytest.skip("operators that were bound before can't go by way of card.py")
    names = {name for op in STEPPED for name in (op, f"{op}_backward")}
    library = torch.library.Library("fasttransformer", "IMPL")
    ours = torch.ops.fasttransformer
    for name in names:
        library.impl(name, getattr(operators, name), "CPU", allow_override=True)
    plain = simt.operator
    monkeypatch.setattr(
        simt, "operator", lambda name: getattr(ours, name).default if name in names else plain(name)
    )
    yield ours
    library._destroy()


@ignore_overriding
@pytest.mark.parametrize("op", ["cross_entropy", "embedding", "rotary_embedding", "feed_forward"])
def test_compiles_without_a_graph_break(registered, op):
    ids, at = torch.tensor([[0, 4, 2]]), torch.tensor([2, 0, 1])
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    query, key, angle = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.rand(9, 4)
    w_in, w_out = torch.randn(12, 5), torch.randn(4, 6)
    tables = angle.cos(), angle.sin()
    calls = {
        "cross_entropy": (lambda x: ft.cross_entropy(x, ids[0], label_smoothing=0.1), x),
        "embedding": (
            lambda w, p: ft.embedding(
                ids, w, positions=at, position_weight=p, sinusoidal=True, padding_idx=2
            ), w, x,
        ),
        "rotary_embedding": (
            lambda q, k: torch.cat(ft.rotary_embedding(q, k, *tables, position_ids=at), 1),
            query, key,
        ),
        "feed_forward": (
            lambda x, a, b: ft.feed_forward(x, a, None, b, None, activation="swiglu"),
            x, w_in, w_out,
        ),
    }  # fmt: skip
    function, *inputs = calls[op]
    leaves = [t.requires_grad_() for t in inputs]

    def run(call):
        out = call(*leaves)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    with contract.running_on("simt"):
        want = run(function)
        got = run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want)


@ignore_overriding
@pytest.mark.parametrize("op", ["cross_entropy", "embedding", "rotary_embedding", "feed_forward"])
def test_under_vmap(registered, op):
    x, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    query, key, angle = torch.randn(4, 1, 2, 3, 8), torch.randn(4, 1, 1, 3, 8), torch.rand(9, 4)
    w_in, w_out = torch.randn(12, 5), torch.randn(4, 6)
    calls = {
        "cross_entropy": (torch.func.grad(ft.cross_entropy), x, target),
        "embedding": (
            torch.func.grad(lambda w, i: ft.embedding(i, w).square().sum()), x, target % 3,
        ),
        "rotary_embedding": (
            lambda q, k: ft.rotary_embedding(q, k, angle.cos(), angle.sin())[0], query, key,
        ),
        "feed_forward": (
            torch.func.grad(
                lambda x: ft.feed_forward(x, w_in, None, w_out, None, activation="geglu").sum()
            ), x,
        ),
    }  # fmt: skip
    function, *args = calls[op]
    with contract.running_on("simt"):
        got = torch.vmap(function)(*args)
        each = [function(*sample) for sample in zip(*args)]
    torch.testing.assert_close(got, torch.stack(each))


@ignore_overriding
def test_b47_opcheck(registered):
    x, target = torch.randn(3, 5), torch.tensor([0, -100, 4])
    losses, statistics = registered.cross_entropy(x, target, None, -100, 0.1)
    ids, query, angle = torch.randint(3, (2, 3)), torch.randn(1, 2, 3, 8), torch.rand(9, 4)
    order = ids.view(-1).sort(stable=True)
    cases = {
        "cross_entropy": (x, target, torch.rand(5), -100, 0.1),
        "cross_entropy_backward": (losses, x, target, None, statistics, -100, 0.1),
        "embedding": (ids, x, None, x, True, 2.0),
        "embedding_backward": (torch.randn(6, 5), *order, 3, 2.0, 1),
        "rotary_embedding": (query, query[:, :1], angle, angle, False, ids[:1]),
        "rotary_embedding_backward": (query, query[:, :1], angle, angle, True, None),
        "activation": (torch.randn(3, 2, 6), CODES["swiglu"]),
        "activation_backward": (torch.randn(3, 3), torch.randn(3, 6), CODES["geglu"]),
    }
    for name, args in cases.items():
        torch.library.opcheck(getattr(registered, name).default, args)


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
    for dropout in ((0.0, None), (0.4, torch.tensor([5]))):
        how = (CODES[name], *dropout)
        out = operators.activation(x, *how)
        assert torch.equal(operators.activation(shifted(x), *how), out)
        got = operators.activation_backward(shifted(grad), shifted(x, 3), *how)
        assert torch.equal(got, operators.activation_backward(grad.contiguous(), x, *how))


def test_activation_empty_and_special(operators):
    assert operators.activation(torch.zeros(0, 8), CODES["swiglu"], 0.0, None).shape == (0, 4)
    assert operators.activation_backward(
        torch.zeros(3, 0), torch.zeros(3, 0), CODES["geglu"], 0.0, None
    ).shape == (
        3,
        0,
    )
    x = torch.tensor([float("nan"), -200.0, 200.0, 0.0])
    for name in ACTIVATIONS:
        out = operators.activation(x, CODES[name])
        torch.testing.assert_close(out, plain(x, name), equal_nan=True)
        ones = torch.ones(4)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(plain(leaf, name).sum(), leaf)
        got = operators.activation_backward(ones, x, CODES[name])
        torch.testing.assert_close(got[1:], want[1:])
