"""attention: strides, odd shapes, gradients of a broadcast bias, index width, memory."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BACKENDS,
    KERNELS,
    compare,
    inputs,
    skip_if_unsupported,
    slow_interpreter,
)

import fasttransformer as ft
from contract import check, running_on
from fasttransformer import reference


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("function", [ft.attention, ft.scaled_dot_product_attention])
def test_b11_innermost_stride(on, function):
    """pytorch/pytorch PR #187506"""
    tensors = [torch.randn(2, 3, 16, 37).transpose(2, 3) for _ in range(3)]
    plain = [x.contiguous() for x in tensors]
    # Of MKL's products of transposed matrices the last bits differ on CPUs without AVX.
    tolerance = 1e-6 if on == "torch" else 0
    with running_on(on):
        want = function(*plain)
        for strided in (tensors, (plain[0], plain[1], tensors[2])):
            torch.testing.assert_close(function(*strided), want, rtol=0, atol=tolerance)
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
