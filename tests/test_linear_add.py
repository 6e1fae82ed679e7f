"""linear_add: the number contract over the product's forms and their edges, layouts, gradients,
threads, transforms, compilation, bad input."""

import itertools

import pytest
import torch

import fasttransformer as ft
from contract import assert_close, backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.backends import TABLE
from fasttransformer.ops._activation import CODES
from fasttransformer.reference.linear_add import ACTIVATIONS as ACTIVATION_FUNCTIONS

BACKENDS = backends_of("linear_add")
KERNELS = [name for name in BACKENDS if name != "torch"]
CPU = [name for name in KERNELS if name.startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]

# (rows, in_features, out_features). Rows: the product's forms change after 4 and 192, tiles are 6
# or 14 rows high and tasks up to 84, of AMX 16 and 32. Features: vectors are 4, 8 or 16 wide,
# 16-bit elements go in pairs, a block is 512 deep, a task 512 wide.
SHAPES = [
    *[(rows, 31, 33) for rows in (0, 1, 2, 4, 5, 16, 17, 191, 192, 193, 300)],
    *[(rows, 1100, 30) for rows in (1, 3, 5, 17, 193)],
    *[(rows, 384, 50) for rows in (2, 16, 85, 193)],
    *[(rows, 33, 1100) for rows in (3, 17, 193)],
    *[(rows, *io) for rows in (3, 5, 193) for io in ((1, 1), (3, 31), (1, 33), (2, 16), (515, 1))],
    (5, 1, 3), (6, 7, 4), (193, 1027, 31), (193, 512, 32), (240, 544, 530),
    (4, 0, 5), (193, 0, 5), (20, 0, 5), (3, 5, 0),
]  # fmt: skip
FORMS = [(3, 37, 29), (23, 37, 29), (200, 37, 29)]  # skinny, exchanged, packed


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def problem(rows, i, o, dtype=torch.float32):
    """input, weight, bias, residual."""
    scale = max(i, 1) ** -0.5
    return (rand(rows, i, dtype=dtype), (torch.randn(o, i) * scale).to(dtype),
            rand(o, dtype=dtype), rand(rows, o, dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("on", KERNELS)
def test_contract(on, shape, dtype):
    check(ft.linear_add, reference.linear_add, problem(*shape, dtype), on=on)


@pytest.mark.parametrize("given", [*itertools.product([False, True], repeat=2)], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("on", BACKENDS)
def test_activations_bias_and_residual(on, activation, given):
    for dtype, shape in itertools.product(DTYPES, FORMS):

        def draw(shape=shape, dtype=dtype):
            x, w, b, r = problem(*shape, dtype)
            return x, w, b if given[0] else None, r if given[1] else None

        for grads in (False, True):  # with gradients the activation is a step of its own
            check(
                lambda *args: ft.linear_add(*args, activation=activation),
                lambda *args: reference.linear_add(*args, activation=activation),
                draw(), on=on, grads=grads, redraw=draw,
                peer=lambda *args: in_steps(*args, activation=activation),
            )  # fmt: skip


def in_steps(x, w, b, r, activation):
    """Plain PyTorch in the inputs' own dtype, one operation after the other, each rounded."""
    y = torch.nn.functional.linear(x, w, b)
    if activation:
        y = ACTIVATION_FUNCTIONS[activation](y)
    return y if r is None else y + r


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_only_wanted_gradients(on, wanted):
    inputs = [x.requires_grad_(w) for x, w in zip(problem(9, 21, 18), wanted)]
    with running_on(on):
        out = ft.linear_add(*inputs)
    assert out.requires_grad == any(wanted)
    if not any(wanted):
        return
    weights = torch.randn_like(out)
    with running_on(on, launched=any(wanted[:3])):  # the residual's is the output's own
        out.backward(weights)
    x, w, _, _ = inputs
    expected = (weights @ w, weights.T @ x, weights.sum(0), weights)
    for tensor, needs, gradient in zip(inputs, wanted, expected):
        assert (tensor.grad is not None) == needs
        if needs:
            torch.testing.assert_close(tensor.grad, gradient.detach())


# ---- layouts ------------------------------------------------------------------------------------


def layouts(shape, dtype):
    """name → (input, weight, residual) over the strides that must read like contiguous ones."""
    rows, i, o = shape
    x, w, _, r = problem(*shape, dtype)
    wide = rand(rows, i + 9, dtype=dtype)
    yield "columns of a wider input", (wide[:, 4 : 4 + i], w, r)
    yield "every second row", (rand(2 * rows, i, dtype=dtype)[::2], w, r)
    yield "transposed input", (rand(i, rows, dtype=dtype).T, w, r)
    yield "expanded input", (rand(1, i, dtype=dtype).expand(rows, i), w, r)
    yield "transposed weight", (x, rand(i, o, dtype=dtype).T, r)
    yield "columns of a wider weight", (x, rand(o, i + 5, dtype=dtype)[:, 2 : 2 + i], r)
    yield "one weight for all", (x, rand(1, 1, dtype=dtype).expand(o, i), r)
    yield "one residual row", (x, w, rand(o, dtype=dtype))
    yield "one residual column", (x, w, rand(rows, 1, dtype=dtype))
    yield "scalar residual", (x, w, rand(1, dtype=dtype)[0])
    yield "columns of a wider residual", (x, w, rand(rows, 2 * o, dtype=dtype)[:, o:])
    yield "transposed residual", (x, w, rand(o, rows, dtype=dtype).T)
    yield "residual reversed in memory", (x, w, r.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize("on", KERNELS)
def test_strides_read_like_contiguous(on, shape, dtype):
    bias = rand(shape[2], dtype=dtype)
    for name, (x, w, r) in layouts(shape, dtype):
        with running_on(on):
            got = ft.linear_add(x, w, bias, r)
            want = ft.linear_add(
                x.contiguous(), w.contiguous(), bias, r.expand(got.shape).contiguous()
            )
        assert torch.equal(got, want), name
        leaves = [t.detach().requires_grad_() for t in (x, w, r)]
        with running_on(on):
            ours = torch.autograd.grad(
                ft.linear_add(leaves[0], leaves[1], bias, leaves[2]).sum(), leaves
            )
        exact = reference.linear_add(*(t.double() for t in (*leaves[:2], bias, leaves[2])))
        rtol = 4e-6 if dtype == torch.float32 else None  # of 200 equal terms torch's are 3e-6 off
        for a, b in zip(ours, torch.autograd.grad(exact.sum(), leaves)):
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=rtol and 1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("on", KERNELS)
def test_leading_dimensions(on, lead):
    inputs = (rand(*lead, 12), rand(7, 12), rand(7), rand(*lead, 7))
    check(ft.linear_add, reference.linear_add, inputs, on=on)


HEADS = {
    "attention's own": lambda b, h, s, e: rand(b, s, h, e).transpose(1, 2),
    "contiguous": rand,
    "batch first of packed": lambda b, h, s, e: rand(b, s, 3, h, e)[:, :, 1].transpose(1, 2),
    "transposed inside": lambda b, h, s, e: rand(b, h, e, s).transpose(2, 3),
    "heads expanded": lambda b, h, s, e: rand(b, 1, s, e).expand(b, h, s, e),
    "batch expanded": lambda b, h, s, e: rand(1, h, s, e).expand(b, h, s, e),
    "sequence expanded": lambda b, h, s, e: rand(b, h, 1, e).expand(b, h, s, e),
    "slice of longer": lambda b, h, s, e: rand(b, h, s + 3, e + 8)[:, :, 1 : s + 1, :e],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("on", KERNELS)
def test_heads_are_read_in_place(on, layout, dtype):
    # Skinny, exchanged, packed; odd head sizes split 16-bit pairs; 99 × 7 is more than a block.
    for b, h, s, e in ((1, 3, 2, 5), (2, 99, 7, 7), (3, 99, 71, 7), (2, 0, 3, 4), (2, 2, 0, 4)):
        x = HEADS[layout](b, h, s, e).to(dtype)
        w, r = (rand(11, h * e) * max(h * e, 1) ** -0.5).to(dtype), rand(b, s, 11, dtype=dtype)
        launched = True if r.numel() else None
        with running_on(on, launched=launched):
            assert ft.linear_add(x, w, residual=r).shape == r.shape
        check(lambda x, w, r: ft.linear_add(x, w, residual=r),
              lambda x, w, r: reference.linear_add(x, w, residual=r), (x, w, r), on=on)  # fmt: skip
        # The cast in check() may lose the layout: gradients once more, of the view itself.
        leaf = x.detach().requires_grad_()
        with running_on(on, launched=launched):
            (got,) = torch.autograd.grad(ft.linear_add(leaf, w, residual=r).sum(), leaf)
        (want,) = torch.autograd.grad(reference.linear_add(leaf, w, residual=r).sum(), leaf)
        assert got.shape == leaf.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("on", BACKENDS)
def test_one_head_is_joined_only_where_the_residual_asks(on):
    x, w = rand(2, 1, 3, 8), rand(5, 8)
    with running_on(on):
        assert ft.linear_add(x, w).shape == (2, 1, 3, 5)
        assert ft.linear_add(x, w, residual=rand(2, 1, 3, 5)).shape == (2, 1, 3, 5)
        assert ft.linear_add(x, w, residual=rand(5)).shape == (2, 1, 3, 5)
        r = rand(2, 3, 5)
        out = ft.linear_add(x, w, residual=r)
        torch.testing.assert_close(out, (x[:, 0] @ w.T) + r)


@pytest.mark.parametrize("on", BACKENDS)
def test_heads_of_no_features_are_joined_where_the_residual_asks(on):
    """Found by fuzzing: the sum was broadcast over heads that nobody has."""
    x, w, b = torch.ones(2, 2, 4, 0, requires_grad=True), torch.ones(7, 0), rand(7)
    with running_on(on, launched=None):
        assert ft.linear_add(x, w, b).shape == (2, 2, 4, 7)
        r = rand(2, 4, 7).requires_grad_()
        out = ft.linear_add(x, w, b, r)
        torch.testing.assert_close(out, b + r)
        d_x, d_r = torch.autograd.grad(out.sum(), (x, r))
    assert d_x.shape == x.shape and torch.equal(d_r, torch.ones_like(r))


# ---- rows keep to themselves --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 40, 20), (23, 600, 20), (200, 40, 20)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("on", BACKENDS)
def test_nan_stays_in_its_row(on, value, shape):
    for dtype in DTYPES:
        x, w, b, r = problem(*shape, dtype)
        row = shape[0] // 2
        with running_on(on):
            clean = ft.linear_add(x, w, b, r)
            x[row, 1] = value
            dirty = ft.linear_add(x, w, b, r)
            x[row] = 0
            r[row, 3] = value
            only = ft.linear_add(x, w, b, r, activation="gelu")
        others = torch.arange(shape[0]) != row
        assert torch.equal(dirty[others], clean[others])
        assert not dirty[row].isfinite().any()
        assert torch.equal(~only.isfinite(), torch.zeros_like(only).bool().index_put_(
            (torch.tensor(row), torch.tensor(3)), torch.tensor(True)))  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("on", KERNELS)
def test_activations_of_extreme_values(on, activation):
    """The product is the input itself, so the activation sees infinities, NaN and huge numbers."""
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, 20.0, -20.0, 88.8, -88.8, 1e30, -1e30,
                       float("inf"), float("nan"), 1e-4, -1e-4, -9.0, 9.0, -0.75]]).T  # fmt: skip
    with running_on(on):
        out = ft.linear_add(x, torch.ones(1, 1), activation=activation)
    wide = reference.linear_add(x.double(), torch.ones(1, 1).double(), activation=activation)
    assert_close(out, wide, reference.linear_add(x, torch.ones(1, 1), activation=activation))
    small = slice(0, 4)  # relative there, not against the largest
    torch.testing.assert_close(out[small], wide[small].float(), rtol=1e-5, atol=1e-37)


def test_minus_infinity_under_relu_is_zero():
    x = torch.tensor([[-float("inf")]])
    for on in BACKENDS:
        with running_on(on):
            assert ft.linear_add(x, torch.ones(1, 1), activation="relu").item() == 0


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 700, 200), (100, 700, 90), (300, 200, 600)], ids=str)
@pytest.mark.parametrize("on", CPU)
def test_equal_whatever_the_thread_count(on, shape, dtype):
    x, w, b, r = problem(*shape, dtype)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, w, b, r)]
            with running_on(on):
                out = ft.linear_add(*leaves)
                return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (2, 2, 3, 5):
        for a, b_ in zip(first, run(threads)):
            assert torch.equal(a, b_), threads


@pytest.mark.parametrize("on", CPU)
def test_rows_do_not_depend_on_their_neighbours(on):
    """A row of a batch is what it is alone, up to rounding; within one form, bit for bit."""
    x, w, b, r = problem(300, 130, 70)
    with running_on(on):
        whole = ft.linear_add(x, w, b, r)
        for rows in (1, 4, 5, 100, 192, 200, 299):
            torch.testing.assert_close(ft.linear_add(x[:rows], w, b, r[:rows]), whole[:rows])


# ---- autocast, compilation, transforms ----------------------------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
def test_autocast(on):
    x, w, b, r = problem(9, 20, 12)
    w.requires_grad_()
    with running_on(on), torch.autocast("cpu", torch.bfloat16):
        out = ft.linear_add(x, w, b, r)
    assert out.dtype == torch.bfloat16
    narrow = [t.bfloat16() for t in (x, w, b, r)]
    assert_close(out, reference.linear_add(*[t.double() for t in narrow]), in_steps(*narrow, None))
    with running_on(on):
        out.sum().backward()
    assert w.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.linear_add(x.double(), w.double()).dtype == torch.float64


@pytest.mark.parametrize("on", [name for name in KERNELS if name in TABLE["linear_add"]] + CPU[-1:])
def test_opcheck(on):
    kernel = TABLE["linear_add"][on.split(":")[0]]
    x, w, b, r = problem(9, 20, 12)
    heads = rand(2, 5, 3, 4)
    for args in (
        (x, w, b, r, CODES[""]),
        (x, w, None, None, CODES["gelu"]),
        (heads, w, b, None, CODES[""]),
        (heads, w, b, rand(2, 3, 12), CODES[""]),
        (rand(2, 3, 20), w, b, rand(2, 3, 12), CODES["relu"]),
        (x.bfloat16(), w.bfloat16(), b.bfloat16(), None, CODES["silu"]),
    ):
        torch.library.opcheck(kernel.forward, args, test_utils=OPCHECKS)
    for flags in itertools.product([False, True], repeat=3):
        for rows in ((9,), (2, 3)):
            args = (rand(*rows, 12), rand(*rows, 20), w, *flags)
            torch.library.opcheck(kernel.backward, args, test_utils=OPCHECKS)


#: What of opcheck applies to operators without a formula of their own for autograd.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("heads", [False, True])
def test_compiles_without_graph_breaks(heads, activation):
    x = rand(2, 3, 4, 5) if heads else rand(2, 4, 15)
    inputs = (x, rand(7, 15), rand(7), rand(2, 4, 7))

    def loss(*args):
        return ft.linear_add(*args, activation=activation).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves),
                    torch.autograd.grad(loss(*leaves), leaves)):  # fmt: skip
        torch.testing.assert_close(a, b)


def per_sample(function, x, r):
    return torch.stack([function(a, b) for a, b in zip(x, r)])


@pytest.mark.parametrize("on", [name for name in BACKENDS if name in ("torch", *CPU[-1:])])
def test_b46_vmap_equals_a_loop(on):
    """pytorch/pytorch#151558."""
    x, r, w, b = rand(4, 6, 9), rand(4, 6, 5), rand(5, 9), rand(5)
    heads = rand(4, 2, 3, 6, 3)
    with running_on(on):
        for activation in (None, "gelu"):
            f = lambda x, r: ft.linear_add(x, w, b, r, activation=activation)  # noqa: B023, E731
            torch.testing.assert_close(torch.vmap(f)(x, r), per_sample(f, x, r))
        f = lambda x, r: ft.linear_add(x, w, residual=r)  # noqa: E731
        zeros = torch.zeros(4, 2, 6, 5)
        torch.testing.assert_close(torch.vmap(f)(heads, zeros), per_sample(f, heads, zeros))
        torch.testing.assert_close(
            torch.vmap(f, in_dims=(1, 2))(x.movedim(0, 1), r.movedim(0, 2)), per_sample(f, x, r)
        )
        torch.testing.assert_close(torch.vmap(f, in_dims=(None, 0))(x[0], r),
                                   torch.stack([f(x[0], y) for y in r]))  # fmt: skip
        each = rand(4, 5, 9)  # a weight per sample
        torch.testing.assert_close(
            torch.vmap(ft.linear_add)(x, each), per_sample(ft.linear_add, x, each)
        )


@pytest.mark.parametrize("on", [name for name in BACKENDS if name in ("torch", *CPU[-1:])])
def test_b46_gradients_per_sample(on):
    """pytorch/pytorch#151558."""
    x, r, w, b = rand(4, 6, 9), rand(4, 6, 5), rand(5, 9), rand(5)

    def loss(x, r, w, b):
        return ft.linear_add(x, w, b, r).square().sum()

    wanted = (0, 1, 2, 3)
    with running_on(on):
        got = torch.vmap(torch.func.grad(loss, argnums=wanted), in_dims=(0, 0, None, None))(
            x, r, w, b
        )
        one = torch.func.grad(loss, argnums=wanted)(x[0], r[0], w, b)
        jacobian = torch.func.jacrev(ft.linear_add)(x[0], w)
    each = [torch.func.grad(loss, argnums=wanted)(*args, w, b) for args in zip(x, r)]
    for i in range(4):
        torch.testing.assert_close(got[i], torch.stack([gradients[i] for gradients in each]))
        torch.testing.assert_close(got[i][0], one[i])
    torch.testing.assert_close(jacobian, torch.func.jacrev(torch.nn.functional.linear)(x[0], w))


def test_meta_tensors():
    inputs = [t.to("meta") for t in problem(6, 5, 4)]
    assert ft.linear_add(*inputs).shape == (6, 4)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
    ({"weight": torch.ones(4, 3).half()}, TypeError, "weight has dtype torch.float16, but"),
    ({"bias": torch.ones(4).double()}, TypeError, "bias has dtype torch.float64"),
    ({"residual": torch.ones(2, 4, device="meta")}, ValueError, "residual is on meta, but"),
    ({"weight": torch.ones(4)}, ValueError, "weight has 1 dimensions"),
    ({"weight": torch.ones(4, 5)}, ValueError, "does not fit weight's in_features 5"),
    ({"input": torch.tensor(1.0)}, ValueError, "input has no dimensions"),
    ({"input": torch.ones(2, 2, 2, 2)}, ValueError, "heads * head_dim"),
    ({"bias": torch.ones(3)}, ValueError, "bias has shape (3,)"),
    ({"residual": torch.ones(3, 4)}, ValueError, "residual of shape (3, 4) does not broadcast"),
    ({"residual": torch.ones(1, 2, 4)}, ValueError, "residual of shape (1, 2, 4) does not"),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
    ({"backend": "fpga"}, ValueError, "'fpga' is not one of"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4),
                 "residual": torch.ones(2, 4)}  # fmt: skip
    ft.linear_add(**arguments)
    with pytest.raises(error) as caught:
        ft.linear_add(**arguments | change)
    assert text in str(caught.value)


def test_float64_runs_on_the_reference():
    explanation = ft.explain("linear_add", rand(2, 3).double(), rand(4, 3).double())
    assert explanation.backend == "torch"
    with pytest.raises(RuntimeError, match="dtype float64"):
        ft.linear_add(rand(2, 3).double(), rand(4, 3).double(), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", [name for name in BACKENDS if name.startswith("cpu")])
def test_few_rows_by_dot_products(on, dtype):
    """At the edges of what is a dot product, with inputs that L1 holds and that it doesn't."""
    for rows, depth in itertools.product((1, 5, 8, 9, 16, 17), (0, 37, 700)):
        x, w, b, r = problem(rows, depth, 45, dtype)
        w = (w.float() * max(depth, 1) ** -0.5).to(dtype)
        check(ft.linear_add, reference.linear_add, (x, w, b, r), on=on, grads=False)
    x, w, b, r = problem(8, 4099, 40, dtype)
    w = (w.float() / 64).to(dtype)
    check(ft.linear_add, reference.linear_add, (x, w, b, r), on=on, grads=False)
