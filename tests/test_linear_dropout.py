"""Dropout in the epilogue of linear_add, linear_add_layer_norm and linear_add_rms_norm: the
reference's mask on every backend, in the gradients too."""

import functools

import pytest
import torch

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops._front import new_seed

OPS = ["linear_add", "linear_add_layer_norm", "linear_add_rms_norm"]
CASES = [(op, on) for op in OPS for on in backends_of(op)]
every = pytest.mark.parametrize("op, on", CASES)
P = 0.3


def problem(op, rows, i, o, dtype=torch.float32):
    """The operation's tensors."""
    shapes = [(o, i), (o,), (rows, o)] + [(o,)] * {"linear_add": 0, "linear_add_rms_norm": 1}.get(
        op, 2
    )
    scale = [max(i, 1) ** -0.5, 1, 1, 1, 1]
    rest = [torch.randn(s) * by for s, by in zip(shapes, scale)]
    return [t.to(dtype) for t in (torch.randn(rows, i), *rest)]


def seeded(op, **options):
    """The public function with the seed that ``wanted`` uses."""

    def call(*inputs):
        torch.manual_seed(9)
        return getattr(ft, op)(*inputs, dropout_p=P, **options)

    return call


def wanted(op, **options):
    torch.manual_seed(9)
    seed = new_seed(torch.device("cpu"))
    if op == "linear_add_rms_norm":
        options.setdefault("eps", torch.finfo(torch.float32).eps)
    return functools.partial(getattr(reference, op), dropout_p=P, seed=seed, **options)


# One row (dot products), few (roles exchanged), whole rows in a task, wide rows, odd sizes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 9, 33), (5, 31, 70), (193, 20, 33), (9, 3, 1100), (0, 3, 4)], ids=str
)
@every
def test_contract(op, on, shape, dtype):
    check(seeded(op), wanted(op), problem(op, *shape, dtype), on=on)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("on", backends_of("linear_add"))
def test_behind_an_activation(on, activation):
    options = {"activation": activation}
    check(seeded("linear_add", **options), wanted("linear_add", **options),
          problem("linear_add", 20, 12, 40), on=on)  # fmt: skip
    inputs = problem("linear_add", 20, 12, 40)
    with running_on(on), torch.no_grad():
        out = seeded("linear_add", **options)(*inputs)
    torch.testing.assert_close(out.cpu(), wanted("linear_add", **options)(*inputs))


@every
def test_the_mask_is_the_references_and_nan_stays_in_its_row(op, on):
    x, weight = torch.ones(40, 8), torch.ones(50, 8) / 8
    x[7] = float("nan")
    torch.manual_seed(9)
    mask = reference.dropout_mask(new_seed(torch.device("cpu")), (40, 50), P)
    with running_on(on), torch.no_grad():
        out = seeded(op)(x, weight)
    summed = (out if op == "linear_add" else out[1]).cpu()
    assert torch.equal(summed != 0, mask)
    assert summed[7][mask[7]].isnan().all() and not summed[[*range(7), *range(8, 40)]].isnan().any()
    torch.testing.assert_close(summed[0][mask[0]], torch.full((int(mask[0].sum()),), 1 / (1 - P)))


@every
def test_heads_a_broadcast_residual_and_three_dimensions(op, on):
    heads, weight = torch.randn(2, 3, 6, 4), torch.randn(17, 12) / 4
    norms = [None] * {"linear_add": 0, "linear_add_rms_norm": 1}.get(op, 2)
    check(seeded(op), wanted(op), [heads, weight, None, torch.randn(17), *norms], on=on)
    rows, residual = torch.randn(2, 6, 12), torch.randn(2, 6, 17)
    check(seeded(op), wanted(op), [rows, weight, None, residual, *norms], on=on)


@every
def test_the_gradient_of_the_sum_alone(op, on):
    if op == "linear_add":
        pytest.skip("its result is the sum")
    check(lambda *t: seeded(op)(*t)[1], lambda *t: wanted(op)(*t)[1], problem(op, 9, 12, 20), on=on)


@pytest.mark.parametrize("op", OPS)
def test_nothing_changes_without_dropout(op):
    inputs = problem(op, 30, 16, 24)
    state = torch.get_rng_state()
    a, b = getattr(ft, op)(*inputs), getattr(ft, op)(*inputs, dropout_p=0.0)
    assert torch.equal(a if op == "linear_add" else a[0], b if op == "linear_add" else b[0])
    assert torch.equal(torch.get_rng_state(), state)  # and no seed was drawn


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
@pytest.mark.parametrize("op", OPS)
def test_bad_probability(op, p):
    with pytest.raises(ValueError, match=rf"{op}: dropout_p is {p}; it must be in \[0, 1\)"):
        getattr(ft, op)(*problem(op, 2, 3, 4), dropout_p=p)


@pytest.mark.parametrize("op", OPS)
def test_compiles_and_maps(op):
    inputs = problem(op, 6, 8, 10)
    dropped = functools.partial(getattr(ft, op), dropout_p=0.5)
    whole = torch.compile(dropped, fullgraph=True, backend="aot_eager")(*inputs)
    for out in [whole] if op == "linear_add" else whole:
        assert out.shape == (6, 10) and out.isfinite().all()
    x = torch.randn(3, 6, 8)

    def call(x):
        out = dropped(x, *inputs[1:])
        return out if op == "linear_add" else out[1]

    out = torch.vmap(call, randomness="different")(x) - inputs[3]
    assert 0.2 < (out.abs() < 1e-6).float().mean() < 0.8
    assert not torch.equal(out[0] == 0, out[1] == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every
def test_rate_and_mean_of_16_bits(op, on, dtype):
    shape = (16, 64) if on == "triton" else (200, 136)
    x = torch.ones(shape[0], 4, dtype=dtype)
    weight = torch.full((shape[1], 4), 0.25, dtype=dtype)
    with running_on(on), torch.no_grad():
        out = getattr(ft, op)(x, weight, dropout_p=0.25)
    summed = (out if op == "linear_add" else out[1]).float()
    kept = summed[summed != 0]
    assert (kept - 4 / 3).abs().max() <= (2**-7 if on == "triton" else 2**-8)
    rate = kept.numel() / summed.numel()
    assert abs(rate - 0.75) < 4 * (0.25 * 0.75 / summed.numel()) ** 0.5


@every
def test_manual_seed_fixes_the_mask(op, on):
    inputs = problem(op, 12, 8, 24)
    with running_on(on), torch.no_grad():
        outs = [seeded(op)(*inputs), seeded(op)(*inputs), getattr(ft, op)(*inputs, dropout_p=P)]
    a, b, other = outs if op == "linear_add" else [out[1] for out in outs]
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_one_mask_whatever_runs_elsewhere():
    """The step behind an activation is the chosen backend's, so its mask is the seed's, too."""
    inputs = problem("linear_add", 6, 5, 9)
    want = wanted("linear_add", activation="gelu")(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    with ft.use_backend("torch"):
        found = seeded("linear_add", activation="gelu", backend="cpu")(*leaves)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_samples(op):
    """vmap of grad: each sample's gradient is that of its own masked product."""
    _, weight, bias, _, *norm = problem(op, 6, 8, 12)

    def loss(x, bias, residual):
        out = getattr(ft, op)(x, weight, bias, residual, *norm, dropout_p=0.5)
        return (out if op == "linear_add" else out[1]).sum()

    # By the sum's gradient a bias's column counts the rows kept: multiples of 1 / (1 − p).
    xs, residuals = torch.randn(3, 6, 8), torch.randn(3, 6, 12)
    each = torch.vmap(
        torch.func.grad(loss, argnums=(0, 1, 2)), (0, None, 0), randomness="different"
    )
    d_x, d_bias, d_residual = each(xs, bias, residuals)
    assert torch.equal(d_residual, torch.ones_like(residuals))
    assert torch.equal(d_bias, (d_bias / 2).round() * 2) and 0 <= d_bias.min() <= d_bias.max() <= 12
    assert not torch.equal(d_bias[0], d_bias[1]) and d_x.shape == xs.shape
