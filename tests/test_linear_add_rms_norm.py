"""linear_add_rms_norm: the number contract where a task owns whole rows and where a second pass
norms them; gradients, mixed dtypes, compilation, transforms, bad input."""

import itertools

import norm_checks
import pytest
import torch

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.backends import TABLE

OP = "linear_add_rms_norm"
BACKENDS = backends_of(OP)
KERNELS = [name for name in BACKENDS if name != "torch"]
CPU = [name for name in KERNELS if name.startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Few rows or more than 4096 features: normed in a second pass. From some 112 rows on (two threads):
# tasks own whole rows.
SHAPES = [
    (0, 9, 8), (1, 31, 33), (3, 5, 17), (5, 31, 33), (17, 40, 1100), (193, 31, 33), (300, 600, 50),
    (300, 24, 1), (250, 33, 1100), (2, 3, 4100), (200, 3, 4100), (200, 3, 4096), (40, 0, 6),
]  # fmt: skip


def problem(rows, i, o, dtype=torch.float32):
    """input, weight, bias, residual, norm_weight."""
    vector = [torch.randn(o).to(dtype) for _ in range(2)]
    return (torch.randn(rows, i).to(dtype), (torch.randn(o, i) * max(i, 1) ** -0.5).to(dtype),
            vector[0], torch.randn(rows, o).to(dtype), vector[1])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("on", KERNELS)
def test_contract(on, shape, dtype):
    inputs = problem(*shape, dtype)
    check(ft.linear_add_rms_norm, reference.linear_add_rms_norm, inputs, on=on)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_without_the_sum(on, dtype):
    norm_checks.check_without_the_sum(OP, lambda *shape: problem(*shape, dtype), on)


@pytest.mark.parametrize("given", [*itertools.product([False, True], repeat=3)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_optional_inputs(on, given):
    for rows in (7, 300):
        x, w, *rest = problem(rows, 20, 30)
        rest = [t if g else None for t, g in zip(rest, given)]
        check(lambda *a: ft.linear_add_rms_norm(*a, 1e-3),
              lambda *a: reference.linear_add_rms_norm(*a, 1e-3), (x, w, *rest), on=on)  # fmt: skip


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("which", ["normed", "summed", "both"])
@pytest.mark.parametrize("on", BACKENDS)
def test_one_wanted_gradient(on, which, wanted):
    def loss(function, inputs):
        normed, summed = function(*inputs)
        chosen = {"normed": [normed], "summed": [summed], "both": [normed, summed]}[which]
        return sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in chosen)

    inputs = problem(9, 14, 12)
    inputs[wanted].requires_grad_()
    if which == "summed" and wanted > 3:
        pytest.skip("the sum does not depend on it")
    with running_on(on):
        (got,) = torch.autograd.grad(loss(ft.linear_add_rms_norm, inputs), inputs[wanted])
    (want,) = torch.autograd.grad(loss(reference.linear_add_rms_norm, inputs), inputs[wanted])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("on", BACKENDS)
def test_nan_stays_in_its_row(on, rows):
    x, *rest = problem(rows, 20, 30)
    row = rows // 2
    with running_on(on):
        clean = ft.linear_add_rms_norm(x, *rest)
        x[row, 0] = float("nan")
        dirty = ft.linear_add_rms_norm(x, *rest)
    others = torch.arange(rows) != row
    for a, b in zip(clean, dirty):
        assert torch.equal(a[others], b[others])
        assert b[row].isnan().all()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("on", KERNELS)
def test_heads_are_read_in_place(on, heads_first):
    for rows in (3, 90):
        x = (
            torch.randn(2, 4, rows, 6)
            if heads_first
            else torch.randn(2, rows, 4, 6).transpose(1, 2)
        )
        _, w, b, _, nw = problem(1, 24, 20)
        check(ft.linear_add_rms_norm, reference.linear_add_rms_norm,
              (x, w, b, torch.randn(2, rows, 20), nw), on=on)  # fmt: skip


@pytest.mark.parametrize("norm_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_b44_norm_weights_of_another_dtype(on, dtype, norm_dtype):
    """intel/intel-extension-for-pytorch#731: the result is in the input's dtype."""

    def draw():
        *linear, nw = problem(6, 20, 16, dtype)
        return (*linear, nw.to(norm_dtype))

    inputs = draw()
    with running_on(on):
        normed, summed = ft.linear_add_rms_norm(*inputs)
    assert normed.dtype == summed.dtype == dtype
    check(ft.linear_add_rms_norm, reference.linear_add_rms_norm, inputs, on=on,
          redraw=draw)  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_default_eps_is_that_of_the_dtype_computed_in(on, dtype):
    if on != "torch" and dtype == torch.float64:
        pytest.skip("float64 runs on the reference alone")
    tiny = torch.full((2, 1), 1e-3, dtype=dtype)  # its square is about float32's epsilon
    wide = torch.promote_types(dtype, torch.float32)
    with running_on(on):
        normed, summed = ft.linear_add_rms_norm(tiny, torch.ones(16, 1, dtype=dtype))
    want = torch.nn.functional.rms_norm(summed.to(wide), (16,)).to(dtype)
    torch.testing.assert_close(normed, want)


@pytest.mark.parametrize("on", CPU)
def test_equal_whatever_the_thread_count(on):
    inputs = problem(300, 70, 90)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with running_on(on):
                results.append(ft.linear_add_rms_norm(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0])  # its sums may run in either pass


@pytest.mark.parametrize("on", CPU[-1:])
def test_opcheck(on):
    kernel = TABLE[OP]["cpu"]
    args = (*problem(9, 20, 12), 1e-5)
    heads = (torch.randn(2, 5, 3, 4), *args[1:3], None, None, 1e-5)
    cases = [(*c, return_sum) for c in (args, heads) for return_sum in (True, False)]
    for case in cases:
        torch.library.opcheck(
            kernel.forward, case,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


def test_compiles_without_graph_breaks():
    inputs = problem(6, 10, 8)

    def loss(*args):
        return sum(o.square().sum() for o in ft.linear_add_rms_norm(*args))

    compiled = torch.compile(loss, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    leaves = [t.requires_grad_() for t in inputs]
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves),
                    torch.autograd.grad(loss(*leaves), leaves)):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on", [name for name in BACKENDS if name in ("torch", *CPU[-1:])])
def test_b46_vmap_equals_a_loop(on):
    """pytorch/pytorch#151558."""
    _, w, b, _, nw = problem(1, 9, 8)
    x, r = torch.randn(4, 5, 9), torch.randn(4, 5, 8)

    def f(x, r):
        return ft.linear_add_rms_norm(x, w, b, r, nw)

    def loss(x, r):
        return sum(o.square().sum() for o in f(x, r))

    with running_on(on):
        for got, *each in zip(torch.vmap(f)(x, r), *[f(*args) for args in zip(x, r)]):
            torch.testing.assert_close(got, torch.stack(each))
        got = torch.vmap(torch.func.grad(loss))(x, r)
        each = [torch.func.grad(loss)(*args) for args in zip(x, r)]
        torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("on", BACKENDS)
def test_autocast(on):
    inputs = problem(9, 20, 12)
    with running_on(on), torch.autocast("cpu", torch.bfloat16):
        normed, summed = ft.linear_add_rms_norm(*inputs)
    assert normed.dtype == summed.dtype == torch.bfloat16


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3).int()}, TypeError, "input has dtype torch.int32"),
    ({"weight": torch.ones(4, 3).half()}, TypeError, "weight has dtype torch.float16"),
    ({"weight": torch.ones(4, 2)}, ValueError, "does not fit weight's in_features 2"),
    ({"residual": torch.ones(5, 4)}, ValueError, "residual of shape (5, 4)"),
    ({"norm_weight": torch.ones(3)}, ValueError, "norm_weight has shape (3,)"),
    ({"norm_weight": torch.ones(4).long()}, TypeError, "norm_weight has dtype torch.int64"),
    ({"norm_weight": torch.ones(4, device="meta")}, ValueError, "norm_weight is on meta"),
    ({"eps": -1e-5}, ValueError, "eps is -1e-05"),
    ({"eps": float("nan")}, ValueError, "eps is nan"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.ones(2, 3), "weight": torch.ones(4, 3),
                 "residual": torch.ones(2, 4),
                 "norm_weight": torch.ones(4)}  # fmt: skip
    ft.linear_add_rms_norm(**arguments)
    with pytest.raises(error) as caught:
        ft.linear_add_rms_norm(**arguments | change)
    assert text in str(caught.value)
