"""attention and scaled_dot_product_attention on every backend that can run here.

Faults that users met are named by their number and report (b01 … b47); the cases of layers and
packed sequences stand with those operations.
"""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttransformer as ft
from contract import assert_close, backends_of, check, running_on
from fasttransformer import reference

BACKENDS = backends_of("attention")
if "cpu:avx512_bf16" in BACKENDS:  # it shares every line of this kernel with avx512
    BACKENDS.remove("cpu:avx512")
KERNELS = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
slow_interpreter = {"triton"} & {name for name in BACKENDS if not torch.cuda.is_available()}


def inputs(batch, heads, kv_heads, q_len, kv_len, dim, value_dim=None, dtype=torch.float32):
    """query, key and value as models give them: (batch, sequence, heads, dim), transposed."""
    shapes = [(batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim),
              (batch, kv_len, kv_heads, value_dim or dim)]  # fmt: skip
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


@contextlib.contextmanager
def skip_if_unsupported():
    try:
        yield
    except RuntimeError as error:
        if "was asked for but can't do this" not in str(error):
            raise
        pytest.skip(str(error))


def compare(on, tensors, grads=True, bias=None, sinks=None, **options):
    """out and lse, and the gradients of query, key, value, bias and sinks, against float64."""

    def call(function):
        def run(query, key, value, bias, sinks):
            return function(query, key, value, bias=bias, sinks=sinks, return_lse=True, **options)

        return run

    with skip_if_unsupported():
        check(call(ft.attention), call(reference.attention), [*tensors, bias, sinks], grads=grads,
              on=on, op="attention")  # fmt: skip


# ---- shapes, dtypes -----------------------------------------------------------------------------

LENGTHS = [(0, 5), (5, 0), (1, 1), (1, 128), (2, 15), (15, 16), (16, 17), (17, 31), (31, 33),
           (33, 65), (65, 128), (128, 2), (130, 257)]  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(on, lengths):
    if on in slow_interpreter and max(lengths) > 65:
        pytest.skip("slow in the interpreter")
    compare(on, inputs(1, 4, 2, *lengths, 32))
    compare(on, inputs(1, 2, 2, *lengths, 16), is_causal=True)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("dim", [1, 3, 8, 32, 33, 64, 80, 128, 256])
def test_head_sizes(on, dim):
    compare(on, inputs(2, 4, 4, 17, 40, dim, dtype=torch.bfloat16))
    if on not in slow_interpreter:
        compare(on, inputs(2, 4, 4, 36, 70, dim))


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(on, dtype):
    size = 20 if on in slow_interpreter else 150
    compare(on, inputs(2, 4, 2, size, size + 3, 64, dtype=dtype))
    compare(on, inputs(2, 4, 2, size, size + 3, 64, dtype=dtype), is_causal=True)


def test_float64_runs_on_the_reference():
    query = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    assert ft.explain("attention", query, query, query).backend == "torch"
    assert ft.attention(query, query, query).dtype == torch.float64


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1), (3, 3)], ids=str)
def test_grouped_heads(on, heads):
    compare(on, inputs(2, *heads, 5, 37, 24))


@pytest.mark.parametrize("on", KERNELS)
def test_long_keys_are_cut_into_parts(on):
    """One head, many keys: the backward's threads share the keys."""
    if on in slow_interpreter:
        pytest.skip("slow in the interpreter")
    for bias in (None, torch.randn(1, 700), torch.randn(300, 700)):
        compare(on, inputs(1, 3, 3, 300, 700, 32), bias=bias)
    tensors, bias = inputs(1, 3, 3, 300, 700, 32), torch.randn(300, 1).requires_grad_()
    with running_on(on):
        _, lse = ft.attention(*tensors, bias=bias, return_lse=True)
        (grad,) = torch.autograd.grad(lse.sum(), bias)
    torch.testing.assert_close(grad, torch.full((300, 1), 3.0))


# ---- options ------------------------------------------------------------------------------------

OPTIONS = {
    "causal": lambda s, t: dict(is_causal=True),
    "causal bottom right": lambda s, t: dict(is_causal=True, causal_alignment="bottom_right"),
    "window": lambda s, t: dict(window=(3, 2)),
    "window left causal": lambda s, t: dict(window=(4, None), is_causal=True),
    "window bottom right": lambda s, t: dict(window=(3, 0), causal_alignment="bottom_right"),
    "softcap": lambda s, t: dict(softcap=1.5),
    "alibi": lambda s, t: dict(alibi_slopes=torch.rand(4)),
    "alibi per batch": lambda s, t: dict(alibi_slopes=torch.rand(2, 4), is_causal=True),
    "sinks": lambda s, t: dict(sinks=torch.randn(4)),
    "key_lengths": lambda s, t: dict(key_lengths=torch.tensor([t - 2, 0])),
    "scale": lambda s, t: dict(scale=0.3),
    "mask": lambda s, t: dict(mask=torch.rand(2, 4, s, t) > 0.4),
    "mask of keys": lambda s, t: dict(mask=torch.rand(2, 1, 1, t) > 0.4),
    "mask of rows": lambda s, t: dict(mask=torch.rand(s, 1) > 0.4),
    "mask transposed": lambda s, t: dict(mask=(torch.rand(t, s) > 0.4).t()),
    "bias": lambda s, t: dict(bias=torch.randn(2, 4, s, t)),
    "bias transposed": lambda s, t: dict(bias=torch.randn(t, s).t()),
    "bias with -inf": lambda s, t: dict(
        bias=torch.randn(s, t).masked_fill(torch.rand(s, t) > 0.7, -torch.inf)
    ),
    "everything": lambda s, t: dict(
        mask=torch.rand(s, t) > 0.2, bias=torch.randn(4, 1, t), is_causal=True, window=(9, 1),
        causal_alignment="bottom_right", softcap=2.0, alibi_slopes=torch.rand(4),
        sinks=torch.randn(4), key_lengths=torch.tensor([t, t - 3]), scale=-0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(on, option):
    if on in slow_interpreter:
        return compare(on, inputs(2, 4, 2, 7, 13, 16), **OPTIONS[option](7, 13))
    compare(on, inputs(2, 4, 2, 7, 13, 16, 24, torch.bfloat16), **OPTIONS[option](7, 13))
    compare(on, inputs(2, 4, 2, 40, 120, 16), **OPTIONS[option](40, 120))
    compare(on, inputs(2, 4, 2, 40, 150, 16), grads=False, **OPTIONS[option](40, 150))


def fixed_seed(monkeypatch, seed):
    module = sys.modules["fasttransformer.ops.attention"]
    monkeypatch.setattr(module, "new_seed", lambda device: seed.to(device))


@pytest.mark.parametrize("on", BACKENDS)
def test_dropout_is_a_function_of_seed_and_position(on, monkeypatch):
    seed = torch.tensor([123456789012345])
    fixed_seed(monkeypatch, seed)
    with skip_if_unsupported():
        for causal in (False, True):
            check(
                lambda q, k, v, c=causal: ft.attention(q, k, v, is_causal=c, dropout_p=0.3),
                lambda q, k, v, c=causal: reference.attention(
                    q, k, v, is_causal=c, dropout_p=0.3, seed=seed
                ),
                inputs(2, 4, 2, 21, 150, 16),
                on=on,
            )


def test_dropout_draws_from_torchs_generator():
    query, key, value = inputs(1, 2, 2, 8, 8, 4)
    torch.manual_seed(5)
    first = ft.attention(query, key, value, dropout_p=0.5)
    assert not torch.equal(first, ft.attention(query, key, value, dropout_p=0.5))
    torch.manual_seed(5)
    assert torch.equal(first, ft.attention(query, key, value, dropout_p=0.5))


# ---- known faults: masks and degenerate rows ----------------------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_b01_row_without_keys(on, kind):
    """pytorch/pytorch#103749"""
    mask = torch.ones(6, 10).tril().bool()
    mask[5] = False
    query, key, value = (x.requires_grad_() for x in inputs(1, 2, 2, 6, 10, 8))
    bias = torch.zeros(6, 10).masked_fill(~mask, -torch.inf)
    option = dict(mask=mask) if kind == "mask" else dict(bias=bias)
    with running_on(on):
        out, lse = ft.attention(query, key, value, return_lse=True, **option)
        assert torch.equal(
            out, ft.scaled_dot_product_attention(query, key, value, *option.values())
        )
        out.sum().backward()
    assert not out[:, :, 5].any() and (lse[:, :, 5] == -torch.inf).all()
    assert not query.grad[:, :, 5].any()
    assert all(x.grad.isfinite().all() for x in (query, key, value))
    assert out[:, :, :5].isfinite().all() and lse[:, :, :5].isfinite().all()
    compare(on, [x.detach() for x in (query, key, value)], **option)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("length", [3, 33, 130])
def test_b02_finfo_min_is_a_number(on, length):
    """pytorch/pytorch#110213"""
    query, key, value = inputs(1, 1, 1, 3, length, 4)
    bias = torch.ones(3, length)
    bias[0] = torch.finfo(torch.float32).min
    with running_on(on):
        out = ft.attention(query, key, value, bias=bias)
    torch.testing.assert_close(out[0, 0, 0], value[0, 0].mean(0))
    if on == "triton":
        pytest.xfail("its backward takes weights of 1 from an lse of finfo.min: see docs/triton.md")
    with skip_if_unsupported():  # without lse: its gradient is beyond float64 here
        check(lambda *x: ft.attention(*x, bias=bias),
              lambda *x: reference.attention(*x, bias=bias),
              [query, key, value], on=on, op="attention")  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("poison", [1e10, float("inf"), float("nan")])
@pytest.mark.parametrize("option", ["mask", "bias", "causal", "key_lengths", "window"])
def test_b04_masked_key_is_not_felt(on, poison, option):
    """pytorch/pytorch#101967"""
    size = 20
    query, key, value = inputs(1, 2, 2, size, size, 4)
    dropped = size - 1
    options = {
        "mask": dict(mask=torch.arange(size) != dropped),
        "bias": dict(bias=torch.where(torch.arange(size) == dropped, -torch.inf, 0.0)),
        "causal": dict(is_causal=True),
        "key_lengths": dict(key_lengths=torch.tensor([dropped])),
        "window": dict(window=(None, 0)),
    }[option]
    last = size if option not in ("causal", "window") else size - 1  # its last query sees the key
    with running_on(on), skip_if_unsupported():
        clean = ft.attention(query, key, value, **options)
        key[0, :, dropped] = poison
        assert torch.equal(ft.attention(query, key, value, **options)[:, :, :last],
                           clean[:, :, :last])  # fmt: skip
        if option == "key_lengths":  # never read, so values are not felt either
            value[0, :, dropped] = poison
            assert torch.equal(ft.attention(query, key, value, **options), clean)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nan_stays_in_its_row(on, poison):
    query, key, value = inputs(1, 2, 2, 20, 40, 8)
    with running_on(on):
        clean = ft.attention(query, key, value)
        query[0, 0, 7] = poison
        out, lse = ft.attention(query, key, value, return_lse=True)
    assert out[0, 0, 7].isnan().all() and not lse[0, 0, 7].isfinite()
    rest = torch.ones(1, 2, 20, dtype=torch.bool)
    rest[0, 0, 7] = False
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("length", [65, 97, 704, 832])
def test_b09_gradient_with_a_very_small_lse(on, length):
    """pytorch/pytorch#196678"""
    if on in slow_interpreter and length > 100:
        pytest.skip("slow in the interpreter")
    tensors = [x * 0.1 for x in inputs(1, 1, 1, length, length, 64)]

    def gradients(**options):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with running_on(on):
            ft.attention(*leaves, **options).sum().backward()
        return [x.grad for x in leaves]

    plain = gradients()
    for options in (
        dict(bias=torch.full((1,), -120.0)),
        dict(mask=torch.ones(length, length, dtype=torch.bool)),
    ):
        for got, want in zip(gradients(**options), plain, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


# ---- known faults: strides, shapes, gradients, index width --------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("function", [ft.attention, ft.scaled_dot_product_attention])
def test_b11_innermost_stride(on, function):
    """pytorch/pytorch PR #187506"""
    tensors = [torch.randn(2, 3, 16, 37).transpose(2, 3) for _ in range(3)]
    plain = [x.contiguous() for x in tensors]
    with running_on(on):
        want = function(*plain)
        assert torch.equal(function(*tensors), want)
        assert torch.equal(function(plain[0], plain[1], tensors[2]), want)
    compare(on, tensors)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kv_len", [31, 32, 33, 34, 129])
def test_b12_stride_0_heads(on, kv_len):
    """pytorch/pytorch#191937"""
    query = torch.randn(1, 8, 5, 64)
    base = torch.randn(2, 1, 1, kv_len, 64).requires_grad_()
    mask = torch.rand(1, 1, 5, kv_len) > 0.5
    key, value = base.expand(2, 1, 8, kv_len, 64).unbind()
    with running_on(on):
        out = ft.attention(query, key, value, mask=mask)
        (grad,) = torch.autograd.grad(out.sum(), base)
        copies = [x.detach().contiguous().requires_grad_() for x in (key, value)]
        want = ft.attention(query, *copies, mask=mask)
        grads = torch.stack(torch.autograd.grad(want.sum(), copies))
    assert torch.equal(out, want)
    torch.testing.assert_close(grad, grads.sum(2, keepdim=True))


@pytest.mark.parametrize("on", BACKENDS)
def test_b12_permuted(on):
    tensors = [torch.randn(84, 3, 3, 64).permute(0, 2, 1, 3) for _ in range(3)]
    if on in slow_interpreter:
        tensors = [x[:4] for x in tensors]
    compare(on, tensors)
    if on not in slow_interpreter:
        compare(on, inputs(1, 2, 1, 5, 33, 512))


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_b14_views_of_one_projection(on, dim):
    """Dao-AILab/flash-attention#2541"""
    heads, length = (1, 33) if on in slow_interpreter else (2, 128)
    weight = torch.randn(3 * heads * dim, 32) / 6
    x = torch.randn(1, length, 32)

    def run(function):
        def call(x, weight):
            fused = F.linear(x, weight).view(1, length, 3, heads, dim)
            return function(*(fused[:, :, i].transpose(1, 2) for i in range(3)))

        return call

    check(run(ft.attention), run(reference.attention), [x, weight], on=on)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 6), (6, 6), (3, 1, 6, 6), (3, 4, 6, 6), (6,), (), (4, 6, 1), (3, 1, 1, 1)],
    ids=str,
)  # fmt: skip
def test_b16_gradient_of_a_bias_that_broadcasts(on, shape):
    """facebookresearch/xformers#783"""
    for dtype in (torch.float32, torch.bfloat16):
        bias = torch.randn(shape).to(dtype)
        # A constant's gradient is a sum that cancels to 0: there is no scale to compare with.
        compare(on, inputs(3, 4, 2, 6, 6, 8, dtype=dtype), bias=bias, grads=shape != ())
        leaf = bias.clone().requires_grad_()
        with running_on(on):
            ft.attention(
                *inputs(3, 4, 2, 6, 6, 8, dtype=dtype), bias=leaf
            ).square().sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype


@pytest.mark.parametrize("on", BACKENDS)
def test_b16_bias_that_is_an_expanded_leaf_or_view(on):
    base = torch.randn(4, 1, 6).requires_grad_()
    tensors = inputs(3, 4, 4, 6, 6, 8)
    with running_on(on):
        (view,) = torch.autograd.grad(
            ft.attention(*tensors, bias=base.expand(3, 4, 6, 6)).square().sum(), base
        )
        leaf = base.detach().expand(3, 4, 6, 6).requires_grad_()
        (own,) = torch.autograd.grad(ft.attention(*tensors, bias=leaf).square().sum(), leaf)
    assert own.shape == (3, 4, 6, 6)
    torch.testing.assert_close(own.sum((0, 2), keepdim=True)[0], view)


@pytest.mark.parametrize("on", KERNELS)
def test_b16_float32_bias_beside_16_bit_inputs(on):
    compare(on, inputs(2, 4, 4, 9, 17, 8, dtype=torch.bfloat16), bias=torch.randn(4, 1, 17),
            grads=on != "triton")  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kv_len", [77, 43])
def test_b17_bias_is_a_slice_of_a_wider_buffer(on, kv_len):
    """facebookresearch/xformers#808"""
    buffer = torch.zeros(2, 8, 77, 80)
    buffer[..., kv_len:] = torch.nan
    tensors = [torch.randn(2, n, 8, 64).transpose(1, 2) for n in (77, kv_len, kv_len)]
    if on in slow_interpreter:
        buffer, tensors = buffer[:1, :2], [x[:1, :2] for x in tensors]
    with running_on(on):
        out = ft.attention(*tensors, bias=buffer[..., :kv_len])
        torch.testing.assert_close(out, ft.attention(*tensors))


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 2, 15, 16, 17])
def test_b19_few_queries(on, q_len):
    """triton-lang/kernels#6"""
    batch, heads = (1, 2) if on in slow_interpreter else (4, 32)
    query, key, value = inputs(batch, heads, heads, 17, 20, 128)
    with running_on(on):
        out = ft.attention(query, key, value)[:, :, :q_len]
        torch.testing.assert_close(ft.attention(query[:, :, :q_len], key, value), out)
    compare(on, [query[:, :2, :q_len], key[:, :2], value[:, :2]])


@pytest.mark.parametrize("on", KERNELS)
def test_decode_reads_grouped_keys_once(on):
    length = 70 if on in slow_interpreter else 1000
    for dtype in (torch.float32, torch.bfloat16):
        compare(on, inputs(1, 8, 2, 1, length, 64, dtype=dtype), grads=dtype != torch.float32)
        compare(on, inputs(1, 8, 2, 2, length, 33, 20, dtype=dtype), grads=False,
                key_lengths=torch.tensor([length - 7]) if on not in slow_interpreter else None,
                is_causal=True, causal_alignment="bottom_right")  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("dims", [(128, 64), (64, 128), (8, 3), (1, 40)], ids=str)
def test_b22_value_head_size(on, dims):
    """pytorch/pytorch#128348"""
    length = 20 if on in slow_interpreter else 70
    compare(on, inputs(2, 2, 2, length, length, *dims))


@pytest.mark.parametrize("on", KERNELS)
def test_b24_long_sequences(on):
    """pytorch/pytorch#162588"""
    if on in slow_interpreter:
        pytest.skip("slow in the interpreter")
    long = 65537
    query, key, value = inputs(1, 1, 1, 4, long, 16)
    with running_on(on):
        out = ft.attention(query, key, value, mask=torch.arange(long) >= 65530)
        want = reference.attention(query, key[:, :, 65530:], value[:, :, 65530:])
        torch.testing.assert_close(out, want)
        out = ft.attention(key, query, query)
        torch.testing.assert_close(
            out[:, :, -3:], reference.attention(key[:, :, -3:], query, query)
        )


@pytest.mark.parametrize("on", KERNELS)
def test_b24_index_width(on):
    """A mask of 2^31 and more elements (stride 0), forward and backward."""
    if on in slow_interpreter:
        pytest.skip("slow in the interpreter")
    batch, length = 40, 8192
    query = torch.randn(1, 1, 1, 8).expand(batch, 1, length, 8)
    key = torch.randn(1, 1, length, 8).expand(batch, 1, length, 8)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(batch, 1, length, length)
    assert mask.numel() > 2**31
    key_lengths = torch.zeros(batch, dtype=torch.int32)  # keeps the work small
    leaf = query.clone().requires_grad_()
    with running_on(on), skip_if_unsupported():
        out = ft.attention(leaf, key, key, mask=mask, key_lengths=key_lengths)
        out.sum().backward()
    assert not out.any() and not leaf.grad.any()


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("scale", [-0.5, -0.001, 0.0])
@pytest.mark.parametrize("option", ["causal", "mask", "window", "none"])
def test_b26_scale_zero_or_less(on, scale, option):
    """pytorch/pytorch PR #105202"""
    options = {"causal": dict(is_causal=True), "mask": dict(mask=torch.ones(4, 4).tril().bool()),
               "window": dict(window=(1, 0)), "none": {}}[option]  # fmt: skip
    compare(on, inputs(1, 1, 1, 4, 4, 8), scale=scale, **options)
    if on not in slow_interpreter:
        compare(on, inputs(1, 2, 2, 40, 40, 8), scale=scale,
                **{k: (torch.ones(40, 40).tril().bool() if k == "mask" else v)
                   for k, v in options.items()})  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"mask": True}, {"window": (16, 16)}], ids=str)
def test_b27_memory_is_linear(options):
    """huggingface/transformers PR #46960: no S × T buffer, and no silent fallback."""
    if "cpu:portable" not in BACKENDS:
        pytest.skip("no C++ library")
    resource = pytest.importorskip("resource")
    length = 6144
    query, key, value = inputs(1, 4, 1, length, length, 32)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    if "mask" in options:
        options = {"mask": torch.ones(length, length, dtype=torch.bool).tril(15).triu(-15)}
    assert ft.explain("attention", *leaves, **options).backend == "cpu"
    window = options.get("window", (16, 16))
    key_lengths = torch.tensor([512])  # bounds the time, not the memory that a buffer would take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = ft.attention(*leaves, **{**options, "window": window}, key_lengths=key_lengths)
    out.sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 4 * length * length  # one float score matrix of one head


def test_b29_dropout_has_no_training_flag():
    """pytorch/pytorch#124464: the function drops (torch's rule), in no_grad too."""
    query, key, value = inputs(1, 2, 2, 16, 16, 8)
    with torch.no_grad():
        plain = ft.scaled_dot_product_attention(query, key, value)
        assert torch.equal(plain, ft.scaled_dot_product_attention(query, key, value))
        dropped = ft.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert not torch.allclose(plain, dropped)


# ---- torch's signature --------------------------------------------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 3, 4, 5, 8)], ids=str)
def test_sdpa_equals_torch(on, shape):
    query, key, value = torch.randn(3, *shape).unbind()
    leading = shape[:-2]
    masks = [None, torch.randn(5, 5), torch.rand(*leading, 5, 5) > 0.3,
             torch.randn(*leading, 1, 5)]  # fmt: skip
    masks += [torch.randn(*leading[:-1], 1, 5, 5)] if len(leading) > 1 else []
    with running_on(on):
        for mask in masks:
            ours = ft.scaled_dot_product_attention(query, key, value, mask)
            torchs = F.scaled_dot_product_attention(query, key, value, mask)
            torch.testing.assert_close(ours, torchs)
        ours = ft.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2)
        torchs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2)
        torch.testing.assert_close(ours, torchs)


def test_sdpa_gqa_and_broadcasting():
    query, key, value = inputs(2, 6, 2, 5, 7, 8)
    ours = ft.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torchs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(ours, torchs)
    with pytest.raises(ValueError, match="query has 6 heads, but key has 2; pass enable_gqa"):
        ft.scaled_dot_product_attention(query, key, value)
    one = ft.scaled_dot_product_attention(query, key[:1, :1], value[:1, :1])
    wide = [x[:1, :1].expand(2, 6, 7, 8) for x in (key, value)]
    torch.testing.assert_close(one, F.scaled_dot_product_attention(query, *wide))


def test_sdpa_gradient_of_a_float_mask():
    query, key, value = torch.randn(3, 2, 3, 4, 5, 8).unbind()
    mask = torch.randn(3, 1, 5, 5).requires_grad_()
    ours = torch.autograd.grad(
        ft.scaled_dot_product_attention(query, key, value, mask).square().sum(), mask
    )
    torchs = torch.autograd.grad(
        F.scaled_dot_product_attention(query, key, value, mask).square().sum(), mask
    )
    torch.testing.assert_close(ours, torchs)


# ---- properties ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 140), st.integers(1, 40), st.booleans(), st.integers(0, 999)
)
def test_permuting_the_keys_changes_nothing(q_len, kv_len, dim, masked, seed):
    torch.manual_seed(seed)
    query, key, value = inputs(1, 2, 1, q_len, kv_len, dim)
    mask = torch.rand(q_len, kv_len) > 0.3 if masked else None
    order = torch.randperm(kv_len)
    out, lse = ft.attention(query, key, value, mask=mask, return_lse=True)
    again, lse_again = ft.attention(
        query, key[:, :, order], value[:, :, order],
        mask=None if mask is None else mask[:, order], return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse_again, lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("on", KERNELS)
def test_gradients_are_deterministic(on):
    size = 20 if on in slow_interpreter else 200
    leaves = [x.requires_grad_() for x in inputs(2, 4, 2, size, size, 32)]
    leaves.append(torch.randn(1, 1, size, size).requires_grad_())
    torch.use_deterministic_algorithms(True)
    try:
        with running_on(on):
            runs = []
            for _ in range(3):
                out = ft.attention(*leaves[:3], bias=leaves[3], is_causal=True)
                runs.append(torch.autograd.grad(out.sum(), leaves))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("on", KERNELS)
def test_gradient_of_lse_alone(on):
    leaves = [x.requires_grad_() for x in inputs(1, 2, 2, 6, 9, 8)]
    with running_on(on):
        _, lse = ft.attention(*leaves, return_lse=True)
        got = torch.autograd.grad(lse.sum(), leaves)
    _, lse = reference.attention(*leaves, return_lse=True)
    want = torch.autograd.grad(lse.sum(), leaves[:2])
    torch.testing.assert_close(got[:2], want)
    assert not got[2].any()


# ---- compile, transforms, autocast --------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_b47_opcheck(name):
    """pytorch/pytorch#179287: fake and real kernels agree on shape, stride and dtype."""
    if "cpu:portable" not in BACKENDS:
        pytest.skip("no C++ library")
    query, key, value = inputs(2, 4, 2, 5, 7, 8, 6)
    bias = torch.randn(4, 1, 7).expand(2, 4, 5, 7)
    mask = (torch.rand(5, 7) > 0.3).expand(2, 4, 5, 7)
    options = (mask, bias, True, True, 3, -1, 2.0, torch.rand(2, 4), torch.randn(4),
               torch.tensor([7, 5], dtype=torch.int32), 0.3, 0.2, torch.tensor([42]))  # fmt: skip
    operators = torch.ops.fasttransformer
    if name == "attention":
        torch.library.opcheck(operators.attention.default, (query, key, value, *options))
        return
    out, lse = operators.attention(query, key, value, *options)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(
        operators.attention_backward.default,
        (*grads, query, key, value, out, lse, *options, True, True),
    )


def test_b47_export():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, mask):
            out = ft.scaled_dot_product_attention(query, key, value, mask)
            return out.transpose(1, 2).view(1, 100, 1024)

    query = torch.randn(1, 100, 32, 32).transpose(1, 2)
    args = (query, torch.randn(1, 32, 100, 32), torch.randn(1, 32, 100, 32), torch.zeros(100, 100))
    exported = torch.export.export(Model(), args)
    torch.testing.assert_close(exported.module()(*args), Model()(*args))


def test_compile_fullgraph_forward_and_backward():
    leaves = [x.requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8)]
    leaves += [torch.randn(4, 1, 7).requires_grad_()]

    def loss(query, key, value, bias):
        out, lse = ft.attention(query, key, value, bias=bias, is_causal=True, return_lse=True)
        plain = ft.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out.square().sum() + lse.sum() + plain.sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), loss(*leaves))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_b46_vmap(backend):
    """pytorch/pytorch#151558"""
    if ft.backends()[backend] is not None:
        pytest.skip("not available")
    query, key, value = torch.randn(3, 4, 2, 2, 5, 8).unbind()
    mask = torch.rand(4, 2, 1, 5, 5) > 0.3
    bias = torch.randn(4, 2, 2, 5, 5)

    def forward(query, key, value, mask):
        return ft.attention(query, key, value, mask=mask, backend=backend)

    def loss(query, key, value, mask, bias):
        out = ft.attention(query, key, value, mask=mask, bias=bias, backend=backend)
        return out.square().sum()

    vmap, grad = torch.func.vmap, torch.func.grad
    loop = [forward(*sample) for sample in zip(query, key, value, mask, strict=True)]
    torch.testing.assert_close(vmap(forward)(query, key, value, mask), torch.stack(loop))
    loop = [forward(*sample, mask[0]) for sample in zip(query, key, value, strict=True)]
    shared = vmap(forward, in_dims=(0, 0, 0, None))(query, key, value, mask[0])
    torch.testing.assert_close(shared, torch.stack(loop))
    gradient = grad(loss, argnums=(0, 1, 2, 4))
    samples = [gradient(*sample) for sample in zip(query, key, value, mask, bias, strict=True)]
    want = [torch.stack(column) for column in zip(*samples, strict=True)]
    torch.testing.assert_close(list(vmap(gradient)(query, key, value, mask, bias)), want)

    def total(query):
        return vmap(loss)(query, key, value, mask, bias).sum()

    torch.testing.assert_close(grad(total)(query), want[0])

    def flat(query, key, value):
        return ft.scaled_dot_product_attention(query, key, value, backend=backend).square().sum()

    got = vmap(grad(flat))(query[:, 0], key[:, 0], value[:, 0])
    samples = [grad(flat)(query[i, 0], key[i, 0], value[i, 0]) for i in range(4)]
    torch.testing.assert_close(got, torch.stack(samples))


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.float64, torch.float16])
def test_autocast(mask_dtype):
    query, key, value = inputs(1, 2, 2, 5, 5, 8)
    mask = torch.ones(5, 5).to(mask_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = ft.scaled_dot_product_attention(query, key.bfloat16(), value, mask)
        assert out.dtype == torch.bfloat16
    halves = [x.bfloat16() for x in (query, key, value)]
    want = reference.scaled_dot_product_attention(*(x.double() for x in halves), mask)
    peer = reference.scaled_dot_product_attention(*halves, mask)
    assert_close(out, want, peer)


# ---- bad input ----------------------------------------------------------------------------------


def bad(expected, message, *shapes, function=ft.attention, **options):
    return pytest.param(expected, message, shapes, function, options, id=message)


GOOD = ((2, 8, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16))


@pytest.mark.parametrize(
    "expected, message, shapes, function, options",
    [
        bad(ValueError, "attention: key has 3 heads, which does not divide query's 8 heads",
            (2, 8, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        bad(ValueError, "query has shape (8, 5, 16); it must have 4 dimensions", (8, 5, 16),
            *GOOD[1:]),
        bad(ValueError, "query has batch 1, key 4 and value 4", (1, 8, 5, 16), (4, 4, 7, 16),
            (4, 4, 7, 16)),
        bad(ValueError, "key has 4 heads, but value has 2", *GOOD[:2], (2, 2, 7, 16)),
        bad(ValueError, "key has length 7, but value has 6", *GOOD[:2], (2, 4, 6, 16)),
        bad(ValueError, "key has head_dim 8, but query has 16", GOOD[0], (2, 4, 7, 8), GOOD[2]),
        bad(ValueError, "mask of shape (7, 5) does not broadcast to (batch, heads, q_len, kv_len) "
            "= (2, 8, 5, 7)", *GOOD, mask=torch.ones(7, 5, dtype=torch.bool)),
        bad(ValueError, "bias of shape (3, 5, 7) does not broadcast", *GOOD,
            bias=torch.zeros(3, 5, 7)),
        bad(TypeError, "mask has dtype torch.float32; it must be bool", *GOOD,
            mask=torch.ones(5, 7)),
        bad(TypeError, "bias has dtype torch.bool; it must be a floating-point dtype", *GOOD,
            bias=torch.ones(5, 7, dtype=torch.bool)),
        bad(ValueError, "causal_alignment is 'left'", *GOOD, causal_alignment="left"),
        bad(ValueError, "window is (-1, 2)", *GOOD, window=(-1, 2)),
        bad(ValueError, "window is 3; it must be (left, right)", *GOOD, window=3),
        bad(ValueError, "softcap is 0.0; it must be positive and finite", *GOOD, softcap=0.0),
        bad(ValueError, "alibi_slopes has shape (4,); it must be (heads,)", *GOOD,
            alibi_slopes=torch.ones(4)),
        bad(ValueError, "sinks has shape (4,); it must be (heads,)", *GOOD, sinks=torch.ones(4)),
        bad(ValueError, "key_lengths has shape (3,); it must be (batch,)", *GOOD,
            key_lengths=torch.ones(3, dtype=torch.int32)),
        bad(TypeError, "key_lengths has dtype torch.float32", *GOOD, key_lengths=torch.ones(2)),
        bad(ValueError, "dropout_p is 1.0; it must be in [0, 1)", *GOOD, dropout_p=1.0),
        bad(ValueError, "backend: 'gpu' is not one of", *GOOD, backend="gpu"),
        bad(ValueError, "attn_mask and is_causal exclude each other", *[GOOD[1]] * 3,
            function=ft.scaled_dot_product_attention, attn_mask=torch.zeros(7, 7), is_causal=True),
        bad(ValueError, "attn_mask of shape (6, 7) does not broadcast", *[GOOD[1]] * 3,
            function=ft.scaled_dot_product_attention, attn_mask=torch.zeros(6, 7)),
        bad(TypeError, "attn_mask has dtype torch.int64; it must be a floating-point dtype or bool",
            *[GOOD[1]] * 3, function=ft.scaled_dot_product_attention,
            attn_mask=torch.ones(7, 7, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_bad_input(expected, message, shapes, function, options):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(expected) as caught:
        function(*tensors, **options)
    assert message in str(caught.value)


def test_bad_dtypes_and_devices():
    query, key, value = inputs(1, 2, 2, 3, 3, 4)
    with pytest.raises(TypeError, match="key has dtype"):
        ft.attention(query, key.half(), value)
    with pytest.raises(TypeError, match="query has dtype"):
        ft.attention(query.long(), key, value)
    with pytest.raises(TypeError, match="value must be a tensor, got list"):
        ft.attention(query, key, [1.0])
    with pytest.raises(ValueError, match="key is on meta"):
        ft.attention(query, key.to("meta"), value)
