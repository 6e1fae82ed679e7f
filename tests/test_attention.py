"""attention on every backend that can run here: shapes, dtypes, options, properties.

Masks and rows without keys stand in test_attention_masks.py, strides, odd shapes and gradients of a
bias in test_attention_shapes.py, torch's signature, transforms and bad input in
test_attention_front.py. Faults that users met are named by their number and report (b01 … b47); the
cases of layers and packed sequences stand with those operations.
"""

import sys

import pytest
import torch
from attention_cases import (
    BACKENDS,
    DTYPES,
    KERNELS,
    compare,
    inputs,
    skip_if_unsupported,
    slow_interpreter,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttransformer as ft
from contract import check, running_on
from fasttransformer import reference

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


# A row's largest weight is as exact as torch's only where the maximum that it is made with is that
# of the very same scores, and not only of the same numbers added up in another order.
@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("queries", "deviation"), [(3, 32), (33, 32), (33, 60)], ids=["few-32", "many-32", "many-60"]
)
def test_f10_large_scores(on, deviation, queries, sinks):
    """Gradients at scores of standard deviation 60: errors were up to 17 times torch's."""
    keys = 40 if on in slow_interpreter else 400

    def draw():
        query, key, value = inputs(1, 2, 2, queries, keys, 32)
        return [query * deviation, key, value, *([torch.randn(2) * deviation] if sinks else [])]

    def attend(package):
        def call(query, key, value, sinks=None):
            return package.attention(query, key, value, sinks=sinks)

        return call

    check(attend(ft), attend(reference), draw(), on=on, redraw=draw)


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
    heads = 1 if on == "simt" else 3
    for bias in (None, torch.randn(1, 700), torch.randn(300, 700)):
        compare(on, inputs(1, heads, heads, 300, 700, 32), bias=bias)
    tensors, bias = inputs(1, heads, heads, 300, 700, 32), torch.randn(300, 1).requires_grad_()
    with running_on(on):
        _, lse = ft.attention(*tensors, bias=bias, return_lse=True)
        (grad,) = torch.autograd.grad(lse.sum(), bias)
    torch.testing.assert_close(grad, torch.full((300, 1), float(heads)))


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
