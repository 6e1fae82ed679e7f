"""Norms of rows far from 1, and of rows of one number: a norm does not depend on its row's scale,
so a row of 1e20 or 1e-30 is normalized like any other, though its squares are no float32."""

import pytest
import torch

import fasttransformer as ft
from contract import backends_of, running_on
from fasttransformer import reference

#: rows' standard deviation → eps: the squares of the first two overflow, of the last vanish.
SIZES = {1e20: 1e-5, 1e34: 1e-5, 1e13: 1e-5, 1e-30: 0.0, 1.0: 1e-5}
FEATURES = 40
LONG = 9000  # beyond what the kernels hold in registers


def rows(features, size, dtype):
    """Rows of `size`, with an ordinary one in between, as kernels take several at a time."""
    x = torch.randn(5, features) * size
    x[2] /= size
    return x.to(dtype)


def layer(ops, x, w, b, eps):
    return ops.layer_norm(x, w.shape, w, b, eps)


def rms(ops, x, w, b, eps):
    return ops.rms_norm(x, w.shape, w, eps)


def add_layer(ops, x, w, b, eps):
    return ops.add_layer_norm(x, torch.zeros_like(x), w.shape, w, b, eps)[0]


def add_rms(ops, x, w, b, eps):
    return ops.add_rms_norm(x, torch.zeros_like(x), w.shape, w, eps)[0]


def linear_layer(ops, x, w, b, eps):
    one = torch.eye(w.shape[0], dtype=x.dtype)
    return ops.linear_add_layer_norm(x, one, None, None, w, b, eps)[0]


def linear_rms(ops, x, w, b, eps):
    one = torch.eye(w.shape[0], dtype=x.dtype)
    return ops.linear_add_rms_norm(x, one, None, None, w, eps)[0]


NORMS = {
    "layer_norm": layer,
    "rms_norm": rms,
    "add_layer_norm": add_layer,
    "add_rms_norm": add_rms,
    "linear_add_layer_norm": linear_layer,
    "linear_add_rms_norm": linear_rms,
}


def cases(norms=NORMS):
    return [pytest.param(op, on, id=f"{op}-{on}") for op in norms for on in backends_of(op)]


def compare_rows(got, want, what):
    """Each row by its own largest number; float32 sums of a few hundred roundings."""
    step = torch.finfo(got.dtype).eps
    got, want = got.double(), want.double()
    largest = want.abs().amax(-1, keepdim=True)
    assert got.isfinite().all(), what
    assert ((got - want).abs() <= (step + 40 * 2.0**-23) * largest).all(), what


def run(op, ops, inputs, eps):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = NORMS[op](ops, *leaves, eps)
    grad = torch.linspace(-5, 5, out.numel()).view_as(out).sin().bfloat16()  # exact in all types
    wanted = leaves[: 3 if "layer" in op else 2]
    return out, torch.autograd.grad(out, wanted, grad.to(out.dtype))


def check_norm(op, on, x, eps):
    w, b = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    with running_on(on):
        out, grads = run(op, ft, [x, w, b], eps)
    want, want_grads = run(op, reference, [x.double(), w.double(), b.double()], eps)
    compare_rows(out, want, "out")
    for name, got, right in zip(("d_input", "d_weight", "d_bias"), grads, want_grads):
        compare_rows(got, right, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op, on", cases())
def test_rows_far_from_one(op, on, size, dtype):
    if on == "simt" and op.startswith("linear") and size < 1:
        pytest.skip("CUDA's fused kernels sum squares by strips of columns, which vanish: rstd inf")
    check_norm(op, on, rows(FEATURES, size, dtype), SIZES[size])


@pytest.mark.parametrize("size", [1e20, 1e-30])
@pytest.mark.parametrize("op, on", cases(["layer_norm", "add_rms_norm"]))
def test_long_rows_far_from_one(op, on, size):
    features = 17000 if on == "triton" else LONG
    check_norm(op, on, rows(features, size, torch.float32)[:2], SIZES[size])


@pytest.mark.parametrize("features", [1, 7, FEATURES, 1030, LONG])
@pytest.mark.parametrize("op, on", cases(["layer_norm", "add_layer_norm"]))
def test_f19_a_row_of_one_number_is_exactly_its_bias(op, on, features):
    """torch's own samples: the normalized value is 0, and so is the weight's gradient."""
    x = torch.tensor([3.3, -1e6, 1 / 3, 0.0, 1e20])[:, None].repeat(1, features)
    w, b = torch.rand(features) + 0.5, torch.randn(features)
    with running_on(on):
        out, (_, d_weight, _) = run(op, ft, [x, w, b], 1e-5)
    assert torch.equal(out, b.expand_as(out))
    assert not d_weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op, on", cases(["layer_norm", "add_layer_norm", "linear_add_layer_norm"]))
def test_f9_gradient_of_a_float32_bias_next_to_a_16_bit_weight(op, on, dtype):
    """It is summed in float32, and is no number of the weight's dtype."""
    x = torch.randn(300, FEATURES).to(dtype)
    w, b = torch.ones(FEATURES, dtype=dtype), torch.zeros(FEATURES)
    grad = torch.full((300, FEATURES), 300.0 + 1 / 16, dtype=torch.float32).to(dtype)
    with running_on(on):
        bias = b.requires_grad_()
        out = NORMS[op](ft, x, w.requires_grad_(), bias, 1e-5)
        (d_bias,) = torch.autograd.grad(out, bias, grad)
    assert d_bias.dtype == torch.float32
    assert torch.equal(d_bias, grad.double().sum(0).float())  # beyond float16's range
