"""attention: masks, biases that mask, rows without keys, NaN, and scores of any size."""

import pytest
import torch
from attention_cases import (
    BACKENDS,
    DTYPES,
    KERNELS,
    compare,
    inputs,
    other_signs,
    skip_if_unsupported,
    slow_interpreter,
)

import fasttransformer as ft
from contract import check, running_on
from fasttransformer import reference


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
    compare_out(on, [query, key, value, bias])


def compare_out(on, tensors, sinks=None, **options):
    """Without lse: its own gradient is beyond float64 where scores are as low as this."""

    def call(function):
        def run(q, k, v, bias, sinks):
            return function(q, k, v, bias=bias, sinks=sinks, **options)

        return run

    with skip_if_unsupported():
        check(call(ft.attention), call(reference.attention), [*tensors, sinks], on=on,
              redraw=lambda: [*other_signs(tensors[:3]), tensors[3], sinks])  # fmt: skip


def masked_by(low, kind, q_len, kv_len):
    """Biases as models make them, whose masked places hold a very low number and not −inf."""
    bias = torch.randn(q_len, kv_len)
    if kind == "rows":
        bias[::2] = low
    elif kind == "all":
        bias[:] = low
    elif kind == "left padding":  # and causal in the bias: the first queries see no key
        bias[:, : kv_len // 2] = low
        bias[torch.ones(q_len, kv_len).triu(1).bool()] = low
    elif kind == "keys":  # every query sees the others
        bias = torch.where(torch.arange(kv_len) % 3 == 0, low, bias)
    return bias


LOW = {
    "min": lambda dtype: torch.finfo(dtype).min,
    "float32's min": lambda dtype: torch.finfo(torch.float32).min,
    "-1e9": lambda dtype: -1e9,
    "-1e4": lambda dtype: -1e4,
}
SURROUNDINGS = {
    "alone": lambda: {},
    "causal": lambda: dict(is_causal=True),
    "sinks": lambda: dict(sinks=torch.randn(8)),
    "low sinks": lambda: dict(sinks=torch.full((8,), -1e9)),
    "mask, window": lambda: dict(mask=torch.rand(9, 37) > 0.3, window=(None, 20)),
}


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_b02_gradients_under_very_low_biases(on, dtype, surroundings):
    """Rows that a number masks everywhere have gradients like any other, whatever the number."""
    for name, low in LOW.items():
        number = low(dtype)
        bias_dtype = dtype if number >= torch.finfo(dtype).min else torch.float32
        if name == "float32's min" and dtype == torch.float32:
            continue
        for kind in ("rows", "all", "left padding", "keys"):
            if on in slow_interpreter and (name, kind) not in INTERPRETED_LOW:
                continue
            options = SURROUNDINGS[surroundings]()
            bias = masked_by(number, kind, 9, 37).to(bias_dtype)
            tensors = [*inputs(1, 8, 2, 9, 37, 8, dtype=dtype), bias]
            compare_out(on, tensors, **options)


INTERPRETED_LOW = {("min", "rows"), ("min", "left padding"), ("-1e9", "all"), ("-1e4", "keys")}


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_bias_beside_sinks_that_want_a_gradient(on, dtype):
    """The sinks' gradient widens the inputs on the CPU; a 16-bit bias was then read as float32."""
    bias, sinks = torch.randn(2, 9, 37).to(dtype), torch.randn(4)
    compare(on, inputs(2, 4, 2, 9, 37, 16, dtype=dtype), bias=bias[:, None], sinks=sinks)
    compare(on, inputs(2, 4, 2, 9, 37, 16, dtype=dtype), bias=bias[0], sinks=sinks)


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
    if length > 100 and (on == "simt" or on in slow_interpreter):
        pytest.skip("slow there, and 65 and 97 keys fill a last tile in part too")
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
