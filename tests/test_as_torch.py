"""f14, f15, b87: what torch's own functions take and give, these do."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fasttransformer as ft
from contract import RUNNABLE, running_on

HERE = [on for on in RUNNABLE if on in ("torch", "cpu:portable", "simt")]


def same(ours, torchs, inputs):
    """Value, dtype and gradients."""
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
    torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=2e-5)
    upstream = torch.randn(ours.shape).to(ours.dtype)
    got, want = (torch.autograd.grad(out, inputs, upstream) for out in (ours, torchs))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("on", HERE)
@pytest.mark.parametrize("mask", [None, (5, 6), (4, 5, 6)], ids=str)
def test_f15_three_dimensions_with_grouped_heads(on, mask):
    q = torch.randn(4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 6, 8, requires_grad=True) for _ in range(2))
    given = None if mask is None else torch.randn(mask)
    want = F.scaled_dot_product_attention(q, k, v, given, enable_gqa=True)
    with running_on(on):
        got = ft.scaled_dot_product_attention(q, k, v, given, enable_gqa=True)
        same(got, want, (q, k, v))


@pytest.mark.parametrize("on", HERE)
@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_f15_everything_dropped(on, dims):
    q, k, v = (torch.randn((2, 3, 2, 5, 8)[-dims:], requires_grad=True) for _ in range(3))
    with running_on(on):
        got = ft.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
        same(got, F.scaled_dot_product_attention(q, k, v, dropout_p=1.0), (q, k, v))


@pytest.mark.parametrize("on", HERE)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_f15_mask_and_is_causal_both_apply(on, kind):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    bias = mask if kind == "bool" else torch.randn(5, 7)
    want = F.scaled_dot_product_attention(q, k, v, bias, is_causal=True)
    with running_on(on):
        got = ft.scaled_dot_product_attention(q, k, v, bias, is_causal=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        ft.scaled_dot_product_attention(q[0], k[0], v[0], bias, is_causal=True)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, repeat=2)], ids=str)
def test_f15_probabilities_of_another_dtype(dtypes, reduction):
    """The loss has the dtype that torch promotes to."""
    logits, target = torch.randn(4, 5).to(dtypes[0]), torch.randn(4, 5).softmax(-1).to(dtypes[1])
    for weight in (None, torch.rand(5)):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
        got = ft.cross_entropy(logits, target, **options)
        want = F.cross_entropy(logits, target, **options)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
        eye = torch.eye(5).to(dtypes[0])
        assert ft.linear_cross_entropy(logits, eye, target, **options).dtype == want.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_b87_an_ignored_row_never_reaches_a_gradient(
    backend, reduction, weighted, smoothing, dtype
):
    """pytorch/pytorch#11551: NaN or inf in a row that is left out poisoned all gradients."""
    target = torch.tensor([1, 2, -100, -100, 3])
    kept = target != -100
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.rand(9).to(dtype).requires_grad_() if weighted else None
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction,
                   "backend": backend}  # fmt: skip

        def gradients(function, rows, *others, options=options, weight=weight):
            found = []
            for keep in (slice(None), kept):
                given = rows.detach()[keep].requires_grad_()
                loss = function(given, *others, target[keep], **options).sum()
                wanted = [given, *others, *([] if weight is None else [weight])]
                found.append((loss, *torch.autograd.grad(loss, wanted)))
            (loss, rows_grad, *rest), (want, want_rows, *want_rest) = found
            torch.testing.assert_close(loss, want)
            assert not rows_grad[~kept].any()
            torch.testing.assert_close((rows_grad[kept], *rest), (want_rows, *want_rest))

        logits = torch.randn(5, 9).to(dtype)
        logits[~kept] = bad
        gradients(ft.cross_entropy, logits)
        rows, matrix = torch.randn(5, 4).to(dtype), torch.randn(9, 4).to(dtype).requires_grad_()
        rows[~kept] = bad
        gradients(ft.linear_cross_entropy, rows, matrix)


def batched(out, inputs, keep):
    """Gradients of three upstream ones at once, and one by one."""
    upstream = torch.randn(3, *out.shape)
    each = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in upstream]
    want = tuple(torch.stack(parts) for parts in zip(*each))
    got = torch.autograd.grad(out, inputs, upstream, retain_graph=keep, is_grads_batched=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_f14_batched_gradients_of_losses(reduction, keep):
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    target = torch.tensor([1, 2, 3, 4])
    batched(ft.linear_cross_entropy(x, w, target, reduction=reduction), (x, w), keep)
    batched(ft.cross_entropy(x, target, reduction=reduction), (x,), keep)


@pytest.mark.parametrize("on", HERE)
@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)], ids=str)
def test_f14_empty_bias_of_stride_0(on, sizes):
    batch, heads, length, kv_length = sizes
    q, k = torch.randn(batch, heads, length, 8), torch.randn(batch, heads, kv_length, 8)
    for shape in (sizes[2:], (batch, 1, length, kv_length), (heads, length, kv_length)):
        bias = torch.randn((1,) * len(shape)).expand(shape).detach().requires_grad_()
        with running_on(on, launched=None):
            out = ft.attention(q, k, k, bias=bias)
            (gradient,) = torch.autograd.grad(out.sum(), bias)
        assert gradient.shape == bias.shape
