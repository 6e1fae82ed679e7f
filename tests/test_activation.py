"""The activation step of feed_forward, by each backend's kernel: values, gradients, any rows."""

import pytest
import torch

from contract import RUNNABLE, check, running_on
from fasttransformer.backends import STEPS
from fasttransformer.ops._activation import activation
from fasttransformer.reference.feed_forward import GATES
from fasttransformer.reference.linear_add import ACTIVATIONS

NAMES = [*ACTIVATIONS, *GATES]
#: simt has its own tests of it (test_simt_steps.py).
BACKENDS = [on for on in RUNNABLE if (k := STEPS["activation"].get(on.split(":")[0])) and k.forward]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, name):
    if name in GATES:
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[GATES[name]](gate) * up
    return ACTIVATIONS[name](x)


def by_kernel(x, name, on):
    return activation(x, name, STEPS["activation"][on.split(":")[0]])


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
