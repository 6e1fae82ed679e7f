"""softmax and log_softmax on every backend against float64, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttransformer as ft
from contract import assert_close, backends_of, check, running_on
from fasttransformer import reference

BACKENDS = backends_of("softmax")
CPU = [b for b in BACKENDS if b.startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = ["softmax", "log_softmax"]
on_every_backend = pytest.mark.parametrize("on", BACKENDS)


def compare(on, op, x, **options):
    check(
        lambda x: getattr(ft, op)(x, **options),
        lambda x: getattr(reference, op)(x, **options),
        [x],
        on=on,
    )


def small(on, columns):
    return on == "triton" and columns > 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 15, 16, 17, 33, 129, 768, 4097, 9000])
@on_every_backend
def test_sizes(on, columns, dtype):
    if small(on, columns):
        pytest.skip("the interpreter is slow")
    x = torch.randn(5 if columns > 1000 else 24, columns, dtype=dtype) * 2
    for op in BOTH:
        if dtype == torch.float32:
            compare(on, op, x, scale=0.5)
            continue
        # The gradient of a 16-bit softmax is taken of its rounded output, in torch as here.
        ours, want, peer = (getattr(m, op) for m in (ft, reference, torch))
        check(
            lambda x, f=ours: f(x, -1),
            lambda x, f=want: f(x, -1),
            [x],
            on=on,
            peer=lambda x, f=peer: f(x, -1),
        )


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("columns", [5, 40, 5000])
@on_every_backend
def test_masks_of_every_stride(on, columns, op):
    if small(on, columns):
        pytest.skip("the interpreter is slow")
    x = torch.randn(2, 3, columns)
    full = torch.rand(2, 3, columns) < 0.6
    full[0, 1] = False  # nothing allowed: 0 (log: −inf), gradient 0
    masks = {
        "full": full,
        "row": full[:, :, :1],
        "column": full[:1, :1],
        "transposed": full.mT.contiguous().mT,
        "every other": torch.rand(2, 3, 2 * columns)[..., ::2] < 0.5,
    }
    for mask in masks.values():
        check(
            lambda x, m=mask: getattr(ft, op)(x, mask=m),
            lambda x, m=mask: getattr(reference, op)(x, mask=m),
            [x],
            on=on,
        )


@pytest.mark.parametrize("scale", [-0.5, -0.001, 0.0])
@on_every_backend
def test_b26_scale_of_zero_or_less(on, scale):
    """pytorch/pytorch PR #105202: −inf put in before scaling becomes +inf or NaN."""
    x = torch.randn(1, 1, 4, 8)
    mask = (torch.arange(8) % 3 != 1).expand(1, 1, 4, 8)
    for op in BOTH:
        compare(on, op, x, scale=scale)
        compare(on, op, x, scale=scale, is_causal=True)
        compare(on, op, x, scale=scale, mask=mask)
        compare(on, op, x, scale=scale, mask=mask, is_causal=True)


@pytest.mark.parametrize("dim", [-1, 1, 0])
@on_every_backend
def test_b49_strided_input(on, dim):
    """NVIDIA/apex PR #1568: wrong results on non-contiguous input or mask."""
    x = torch.randn(4, 8, 16, 16).transpose(2, 3)
    mask = (torch.rand(4, 1, 1, 16) < 0.7).expand(4, 8, 16, 16)
    for op in BOTH:
        compare(on, op, x, dim=dim)
        compare(on, op, x, dim=dim, mask=mask)


@pytest.mark.parametrize("on", CPU)
def test_b49_offsets_beyond_2_31(on):
    """Rows more than 2^31 elements apart; the memory between them is never touched."""
    far = 2**31 + 7
    x = torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 64), (far, 1))
    mask = torch.empty(far + 64, dtype=torch.bool).as_strided((2, 64), (far, 1))
    x.copy_(torch.randn(2, 64))
    mask.copy_(torch.rand(2, 64) < 0.5)
    with running_on(on):
        out = ft.softmax(x, mask=mask)
        assert torch.equal(out, ft.softmax(x.contiguous(), mask=mask.contiguous()))


@pytest.mark.parametrize("on", CPU)
def test_b49_more_than_2_31_elements(on, full_size):
    """The view itself needs no memory, but the output is dense: 4.3 GB in 16 bits."""
    row = torch.randn(1, 2048).bfloat16()
    with running_on(on):
        out = ft.softmax(row.expand(2**20 + 1, 2048))
        assert out.numel() > 2**31
        want = ft.softmax(row)
    assert all(torch.equal(piece, want.expand_as(piece)) for piece in out.split(2**14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_nan_and_infinity_stay_in_their_row(on, dtype):
    x = torch.randn(6, 45).to(dtype)
    x[1, 3], x[2, 4], x[3, 5] = float("nan"), float("inf"), float("-inf")
    x[4] = float("-inf")
    x[5] = float("-inf")
    x[5, 2] = float("nan")
    for op in BOTH:
        with running_on(on):
            out = getattr(ft, op)(x)
        want = getattr(torch, op)(x.double(), -1)
        assert torch.equal(out.isnan(), want.isnan())
        assert_close(out, want, getattr(torch, op)(x, -1))


@pytest.mark.parametrize("on", CPU)
def test_blocks_of_a_long_row_that_differ_wildly(on):
    x = torch.randn(4, 3 * 4096 + 5)
    x[0, :4096] -= 300
    x[1, 4096:8192] += 300
    x[2, 8192:] = float("-inf")
    x[3, :4096] = float("-inf")
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, :4096] = False
    for op in BOTH:
        compare(on, op, x)
        compare(on, op, x, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_masked_out_nan_is_never_felt(on, dtype):
    x = torch.randn(3, 40).to(dtype)
    x[:, 7] = float("nan")
    mask = torch.ones(40, dtype=torch.bool)
    mask[7] = False
    with running_on(on):
        out = ft.softmax(x, mask=mask)
    assert out[:, 7].eq(0).all()
    assert out.float().sum(-1).sub(1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on", CPU)
def test_log_softmax_far_from_zero(on, dtype):
    x = (torch.randn(5, 257) + 1000).to(dtype)
    check(
        ft.log_softmax,
        lambda x: reference.log_softmax(x),
        [x],
        on=on,
        peer=lambda x: torch.log_softmax(x, -1),
    )


@on_every_backend
def test_scalar_empty_and_many_dimensions(on):
    with running_on(on):
        assert ft.softmax(torch.tensor(3.0)).item() == 1.0
        for shape in ((0,), (0, 5), (3, 0), (2, 0, 4)):
            assert ft.softmax(torch.zeros(shape)).shape == shape
        deep = torch.randn(2, 1, 2, 1, 2, 1, 2, 3).transpose(0, 2)
        want = torch.softmax(deep, -1)
        assert torch.allclose(ft.softmax(deep), want, atol=1e-6)


@pytest.mark.parametrize("on", CPU)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    shift=st.floats(-50, 50),
    seed=st.integers(0),
)
def test_properties(on, rows, columns, shift, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed % 2**31))
    with running_on(on):
        out, moved = ft.softmax(x), ft.softmax(x + shift)
        assert torch.allclose(ft.log_softmax(x).exp(), out, atol=1e-6)
    assert torch.allclose(out.sum(-1), torch.ones(rows), atol=1e-6)
    assert torch.allclose(out, moved, atol=2e-5)
    assert (out >= 0).all()


def test_b46_vmap_equals_a_loop():
    """pytorch/pytorch#151558: vmap refused or slow with a mask."""
    x, mask = torch.randn(4, 2, 3, 5), torch.rand(4, 2, 1, 5) < 0.7
    for f, args, dims in (
        (lambda x: ft.softmax(x), (x,), 0),
        (lambda x: ft.softmax(x, is_causal=True), (x,), 1),
        (lambda x, m: ft.softmax(x, mask=m), (x, mask), (0, 0)),
        (lambda x, m: ft.log_softmax(x, mask=m), (x, mask[0]), (0, None)),
    ):
        out = torch.vmap(f, dims)(*args)
        first = dims if isinstance(dims, int) else 0
        for i in range(x.shape[first]):
            pick = [
                a if d is None else a.select(d, i)
                for a, d in zip(args, dims if isinstance(dims, tuple) else (dims,))
            ]
            assert torch.allclose(out[i], f(*pick), atol=1e-6, equal_nan=True)
    grads = torch.vmap(torch.func.grad(lambda x: (ft.softmax(x) ** 2).sum()))(x)
    want = torch.vmap(torch.func.grad(lambda x: (torch.softmax(x, -1) ** 2).sum()))(x)
    assert torch.allclose(grads, want, atol=1e-6)


def test_b47_opcheck():
    """pytorch/pytorch#179287: real and fake kernels must agree on strides."""
    ops = torch.ops.fasttransformer
    x, mask = torch.randn(3, 4, 5).transpose(0, 1), torch.rand(4, 3, 5) < 0.5
    for args in ((x, 1.0, None, False, False), (x, 0.5, mask, True, True)):
        torch.library.opcheck(ops.softmax.default, args)
    out = ops.softmax(x, 1.0, None, False, False)
    torch.library.opcheck(ops.softmax_backward.default, (torch.randn(4, 3, 5), out, 1.0, False))


def test_compiles_without_a_graph_break():
    x = torch.randn(4, 3, 6, requires_grad=True)
    mask = torch.rand(3, 6) < 0.8

    def f(x):
        return ft.softmax(x, mask=mask) + ft.log_softmax(x * 2, dim=1)

    out = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(out, f(x))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (want,) = torch.autograd.grad(f(x).square().sum(), x)
    assert torch.allclose(grad, want, atol=1e-6)


def test_autocast_as_in_torch():
    x = torch.randn(3, 4).bfloat16()
    with torch.autocast("cpu"):
        assert ft.softmax(x).dtype == torch.softmax(x, -1).dtype


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "input has dtype torch.int64", lambda x: ft.softmax(x.long())),
        (TypeError, "mask has dtype", lambda x: ft.softmax(x, mask=x)),
        (ValueError, "does not broadcast", lambda x: ft.softmax(x, mask=torch.ones(7).bool())),
        (ValueError, "dim is 5", lambda x: ft.log_softmax(x, 5)),
        (ValueError, "is_causal needs", lambda x: ft.softmax(x, 0, is_causal=True)),
        (ValueError, "is not one of", lambda x: ft.softmax(x, backend="gpu")),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call(torch.randn(3, 4))
