"""Rows that no cache holds: CPU kernels then take them one by one and write around the caches. What
comes out is what a call of few rows gives, to the bit, wherever a row depends on no other."""

import functools

import pytest
import torch
from instruction_sets import SETS

import fasttransformer as ft
from contract import running_on
from fasttransformer.backends import backends

pytestmark = pytest.mark.skipif(backends()["cpu"] is not None, reason=str(backends()["cpu"]))

#: Bytes of an input: input and output together are more than the largest last-level cache of a few
#: processors.
BYTES = 40 << 20
FEW = 24  # rows of the call that is compared
DTYPES = [torch.float32, torch.bfloat16]

NORMS = {
    "layer_norm": lambda x, w: ft.layer_norm(x, (x.shape[-1],), w, w),
    "rms_norm": lambda x, w: ft.rms_norm(x, (x.shape[-1],), w),
    "add_layer_norm": lambda x, w: ft.add_layer_norm(x, x.flip(-1), (x.shape[-1],), w, w)[0],
    "add_rms_norm": lambda x, w: ft.add_rms_norm(x, x.flip(-1), (x.shape[-1],), w)[0],
}
ROWS = {
    "softmax": ft.softmax,
    "log_softmax": ft.log_softmax,
    "softmax scale": lambda x: ft.softmax(x, scale=-0.5),
    "softmax mask": lambda x: ft.softmax(x, mask=torch.arange(x.shape[-1]) % 3 > 0),
}


@functools.lru_cache(maxsize=2)
def many_rows(columns, dtype, seed=0):
    """Drawing them takes longer than what is tested: tests share them, and change none."""
    generator = torch.Generator().manual_seed(seed)
    shape = BYTES // dtype.itemsize // columns, columns
    return torch.randn(shape, dtype=dtype, generator=generator)


def with_gradient(function, x, grad):
    x = x.detach().requires_grad_()
    out = function(x)
    (d_x,) = torch.autograd.grad(out, x, grad)
    return out.detach(), d_x


def assert_rows_alike(function, x):
    """The first and last rows of a call of all are those of a call of few, with their gradients."""
    grad = many_rows(x.shape[-1], x.dtype, seed=1)
    out, d_x = with_gradient(function, x, grad)
    for rows in (slice(0, FEW), slice(-FEW, None)):
        few_out, few_d_x = with_gradient(function, x[rows], grad[rows])
        assert torch.equal(out[rows], few_out)
        assert torch.equal(d_x[rows], few_d_x)


@pytest.mark.parametrize("name", [*NORMS, *ROWS])
@pytest.mark.parametrize("columns", [768, 1001, 5008])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_a_small_call(name, columns, dtype):
    x = many_rows(columns, dtype)
    if name in NORMS:
        weight = torch.randn(columns, dtype=dtype)
        assert_rows_alike(lambda x: NORMS[name](x, weight), x)
    else:
        assert_rows_alike(ROWS[name], x)


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    with running_on(f"cpu:{isa}"):
        x = many_rows(768, torch.float32)
        weight = torch.randn(768)
        assert_rows_alike(lambda x: NORMS["layer_norm"](x, weight), x)
        assert_rows_alike(ft.softmax, x)
        assert_rows_alike(ft.softmax, many_rows(768, torch.bfloat16))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_weights_are_sums_of_all_rows(name):
    x = many_rows(768, torch.float32)
    weight = torch.randn(768, requires_grad=True)
    grad = many_rows(768, torch.float32, seed=1)
    (d_weight,) = torch.autograd.grad(NORMS[name](x, weight), weight, grad)
    wide = weight.detach().double().requires_grad_()
    with ft.use_backend("torch"):
        (wanted,) = torch.autograd.grad(NORMS[name](x.double(), wide), wide, grad.double())
    torch.testing.assert_close(d_weight.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max())


def test_gradients_are_the_same_bits_on_any_number_of_threads(two_threads):
    x = many_rows(768, torch.float32)
    weight = torch.randn(768, requires_grad=True)
    found = []
    for threads in (two_threads, 1):
        torch.set_num_threads(threads)
        out = NORMS["layer_norm"](x, weight)
        found.append(torch.autograd.grad(out, weight, torch.ones_like(x))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(dtype, weighted):
    x = many_rows(8192, dtype)
    target = torch.randint(8192, (len(x),))
    target[::5] = -100
    weight = torch.rand(8192) if weighted else None
    options = {"weight": weight, "reduction": "none", "label_smoothing": 0.1}

    def losses(x, target):
        return ft.cross_entropy(x, target, **options)

    ones = torch.ones(len(x), dtype=dtype)
    _, d_x = with_gradient(lambda x: losses(x, target), x, ones)
    for rows in (slice(0, FEW), slice(-FEW, None)):
        _, few = with_gradient(lambda x: losses(x, target[rows]), x[rows], ones[rows])  # noqa: B023
        assert torch.equal(d_x[rows], few)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved):
    length, heads = 2048, 40
    q, k = torch.randn(1, heads, length, 128), torch.randn(1, 2, length, 128)
    cos, sin = torch.randn(length, 64), torch.randn(length, 64)
    out = ft.rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    few = ft.rotary_embedding(
        q[:, :3, :50], k[:, :, :50], cos[:50], sin[:50], interleaved=interleaved
    )
    assert torch.equal(out[0][:, :3, :50], few[0]) and torch.equal(out[1][:, :, :50], few[1])


def test_decoding_reads_keys_in_memory_like_keys_in_a_cache():
    """32 query heads on 8 key heads over 40 MiB of keys and values."""
    for heads in (8, 32):
        q, k, v = torch.randn(1, heads, 1, 128), *torch.randn(2, 1, 8, 5000, 128)
        out = ft.attention(q, k, v)
        few = ft.attention(q[:, : heads // 8], k[:, :1], v[:, :1])
        torch.testing.assert_close(out[:, : heads // 8], few, rtol=0, atol=1e-6)
