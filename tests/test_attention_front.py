"""attention as torch sees it: its own signature, compile, transforms, autocast, bad input."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, inputs

import fasttransformer as ft
from contract import assert_close, running_on
from fasttransformer import reference

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
        bad(ValueError, "attn_mask and is_causal exclude each other", *[GOOD[1][1:]] * 3,
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
