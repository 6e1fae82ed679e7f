"""The activation step of feed_forward, by each backend's kernel: values, gradients, any rows; and
dropout, in it or alone."""

import pytest
import torch

from contract import On, backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.backends import STEPS
from fasttransformer.ops._activation import activation
from fasttransformer.ops._front import new_seed
from fasttransformer.reference.feed_forward import GATES
from fasttransformer.reference.linear_add import ACTIVATIONS

NAMES = [*ACTIVATIONS, *GATES]
#: simt has its own tests of it (test_simt_steps.py).
BACKENDS = [on for on in backends_of("activation") if on not in ("simt", "torch")]
#: of dropout: simt too.
MASKED = [on for on in backends_of("activation") if on != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, name):
    if name in GATES:
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[GATES[name]](gate) * up
    return ACTIVATIONS[name](x)


def by_kernel(x, name, on, dropout_p=0.0):
    step = {"simt": "cuda"}.get(on, on.split(":")[0])
    return activation(x, name, STEPS["activation"][step], dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, name, dtype):
    for shape, spread in (((3, 2), 3.0), ((2, 3, 66), 3.0), ((130, 48), 0.01), ((2, 5000), 10.0)):
        check(
            lambda x: by_kernel(x, name, on),
            lambda x: plain(x, name),
            [(spread * torch.randn(shape)).to(dtype)],
            on=on,
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on", BACKENDS)
def test_every_bfloat16_number(on, name):
    """All 65,536 of them, NaN and infinities too, against torch's own activation in float64."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = numbers[:, None].expand(-1, 2).contiguous() if name in GATES else numbers[:, None]
    if name in GATES:
        x[:, 1] = 0.75  # no product is past the largest number
    check(lambda x: by_kernel(x, name, on), lambda x: plain(x, name), [x], on=on, grads=False)
    size = x[:, 0].abs()  # a GPU, and the interpreter, may take subnormal numbers for 0
    near = x[(size < 1e30) & ((size == 0) | (size > 1e-37))]
    check(lambda x: by_kernel(x, name, on), lambda x: plain(x, name), [near], on=on)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("on", BACKENDS)
def test_strided_rows_and_no_elements(on, name):
    wide = torch.randn(37, 50, requires_grad=True)
    rows = wide[:, 3:25]
    with running_on(on):
        out = by_kernel(rows, name, on)
        (gradient,) = torch.autograd.grad(out.sum(), wide)
        want = by_kernel(rows.contiguous(), name, on)
        (wanted,) = torch.autograd.grad(want.sum(), wide)
        for shape in ((0, 8), (3, 0), (2, 0, 6)):
            x = torch.zeros(shape, requires_grad=True)
            empty = by_kernel(x, name, on)
            assert empty.shape == plain(x, name).shape
            assert torch.autograd.grad(empty.sum(), x)[0].shape == shape
    assert torch.equal(out, want) and torch.equal(gradient, wanted)


def with_mask(x, name, mask, dropout_p):
    out = plain(x, name) if name else x
    return torch.where(mask, out / (1.0 - dropout_p), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["", "relu", "gelu", "swiglu"])
@pytest.mark.parametrize("on", MASKED)
def test_dropout_is_the_references(on, name, dtype):
    """Of every shape, at every position of a run, forward and backward."""
    draws = torch.Generator().manual_seed(0)
    for shape in ((3, 2), (5, 66), (2, 3, 22), (7, 1050), (1, 2), (0, 4)):
        torch.manual_seed(11)
        width = shape[-1] // 2 if name in GATES else shape[-1]
        mask = reference.dropout_mask(new_seed(torch.device("cpu")), (*shape[:-1], width), 0.3)

        def ours(x):
            torch.manual_seed(11)
            return by_kernel(x, name, on, 0.3)

        draw = lambda shape=shape: [torch.randn(shape, generator=draws).to(dtype)]  # noqa: E731
        # The gradient of dropout alone is dropout again: it has no backward kernel to ask for.
        held = on if name else On(str(on))
        check(ours, lambda x, m=mask: with_mask(x, name, m, 0.3), draw(), on=held, redraw=draw)
        with running_on(on, launched=None if 0 in shape else True):
            out = ours(torch.ones(shape, dtype=dtype))
        assert torch.equal(out.cpu() != 0, mask)


@pytest.mark.parametrize("on", MASKED)
def test_dropout_of_strided_rows_and_of_nan(on):
    wide = torch.randn(37, 50)
    wide[3] = float("nan")
    with running_on(on):
        for name in ("", "gelu", "geglu"):
            torch.manual_seed(1)
            out = by_kernel(wide[:, 3:25], name, on, 0.5)
            torch.manual_seed(1)
            again = by_kernel(wide[:, 3:25].contiguous(), name, on, 0.5)
            assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0))
            dropped = out[3] == 0
            assert 0 < dropped.sum() < len(dropped) and out[3][~dropped].isnan().all()
            assert not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("on", MASKED)
def test_slope_of_gelu_tanh_keeps_its_digits(on):
    """1 − sigmoid(2u), which the slope multiplies by up to x³, must not be a difference from 1."""
    x = torch.linspace(-8, 8, 4001)
    slopes = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        if leaf.dtype == torch.float32:
            with running_on(on):
                out = by_kernel(leaf, "gelu_tanh", on)
                slopes += torch.autograd.grad(out.sum(), leaf)
        else:
            slopes += torch.autograd.grad(plain(leaf, "gelu_tanh").sum(), leaf)
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=0, atol=4e-7)
