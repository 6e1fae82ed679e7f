"""attention_decode: step by step equals one long call; the cache's limits; nothing is written when
an error is raised."""

import sys

import pytest
import torch
from fronts import refuses

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference


def filled(lengths=(3, 5), capacity=8, dtype=torch.float64, heads=2):
    """A cache whose samples hold ``lengths`` tokens, and garbage behind them."""
    cache = ft.KVCache.allocate(2, len(lengths), heads, capacity, 8, 6, dtype=dtype)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    for b, n in enumerate(lengths):
        cache.keys[1, b, :, :n] = torch.randn(heads, n, 8)
        cache.values[1, b, :, :n] = torch.randn(heads, n, 6)
        cache.lengths[1, b] = n
    return cache


def new(count, dtype=torch.float64):
    """query, new_key, new_value of ``count`` tokens."""
    return (torch.randn(2, 4, count, 8, dtype=dtype), torch.randn(2, 2, count, 8, dtype=dtype),
            torch.randn(2, 2, count, 6, dtype=dtype))  # fmt: skip


def run_on(on, module, tensors, keys, values, lengths, **options):
    """attention_decode over a cache that holds the given keys and values."""
    query, new_key, new_value = tensors
    cache = ft.KVCache(keys[None].clone(), values[None].clone(), lengths[None].clone())
    return module.attention_decode(
        query, cache, new_key=new_key, new_value=new_value, return_lse=True, **options
    )


GRID = {
    "plain": {},
    "not causal": {"is_causal": False},
    "window": {"window": (20, 0)},
    "softcap, scale": {"softcap": 3.0, "scale": 0.3},
    "alibi": {"alibi_slopes": torch.rand(3, 4)},
    "sinks": {"sinks": torch.randn(4)},
    "mask": {"mask": torch.rand(3, 1, 1, 150) < 0.7},
    "bias": {"bias": torch.randn(4, 1, 150)},
}


@pytest.mark.parametrize("on", backends_of("attention_decode"))
@pytest.mark.parametrize("options", GRID)
def test_contract(on, options):
    """Samples of different lengths, with garbage behind them, by what each of them holds."""
    lengths, small = torch.tensor([120, 0, 17], dtype=torch.int32), on == "triton"
    for dtype in [torch.bfloat16] if small else [torch.float32, torch.bfloat16, torch.float16]:
        for count, dim in [(1, 16)] if small else [(1, 64), (3, 24), (17, 128)]:
            tensors = [torch.randn(3, heads, count, dim).to(dtype) for heads in (4, 2, 2)]
            keys, values = torch.randn(2, 3, 2, 150, dim).to(dtype).unbind()
            for b, length in enumerate(lengths):
                keys[b, :, length:] = float("nan")
                values[b, :, length:] = float("nan")

            def call(module, keys=keys, values=values):
                def run(*given):
                    wide = given[0].dtype
                    with torch.no_grad():
                        return run_on(on, module, given, keys.to(wide), values.to(wide), lengths,
                                      **GRID[options])  # fmt: skip

                return run

            check(call(ft), call(reference), tensors, grads=False, on=on)


def test_operator_keeps_torchs_rules():
    query, keys = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.fasttransformer.attention_decode.default,
        (query, keys, keys, lengths, None, None, True, -1, -1, 0.0, None, None, 0.3),
    )


def test_lengths_that_are_set_by_hand_are_seen():
    cache, (q, k, v) = filled((3, 3)), new(1)
    assert cache.extremes(1) == (3, 3)
    ft.attention_decode(q, cache, layer=1, new_key=k, new_value=v)
    assert cache.extremes(1) == (4, 4) and cache.extremes(0) == (0, 0)
    cache.lengths[1, 0] = 7
    assert cache.extremes(1) == (4, 7)
    cache.lengths = torch.full_like(cache.lengths, 2)
    assert cache.extremes(1) == (2, 2)
    with torch.inference_mode():
        other = ft.KVCache.allocate(1, 2, 2, 8, 8, 6)
        ft.attention_decode(q.float(), other, new_key=k.float(), new_value=v.float())
        assert other.extremes(0) == (1, 1)


OPTIONS = [{}, {"window": (2, None)}, {"softcap": 3.0, "scale": 0.3},
           {"alibi_slopes": torch.rand(4)},
           {"sinks": torch.randn(4)}, {"is_causal": False}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_attention_over_each_samples_tokens(count, options):
    cache, (q, k, v) = filled(), new(count)
    q.requires_grad_()
    out, lse = ft.attention_decode(
        q, cache, layer=1, new_key=k, new_value=v, return_lse=True, **options
    )
    assert cache.lengths.tolist() == [[0, 0], [3 + count, 5 + count]]
    for b, n in enumerate(cache.lengths[1]):
        keys, values = cache.keys[1, b, :, :n], cache.values[1, b, :, :n]
        torch.testing.assert_close(keys[:, -count:], k[b])
        options = {"is_causal": True, **options}
        want = ft.attention(
            q[b][None], keys[None], values[None], causal_alignment="bottom_right",
            return_lse=True, backend="torch", **options,
        )  # fmt: skip
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), want)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_b19_one_query_at_a_time_equals_the_long_call(length):
    """triton-lang/kernels#6."""
    q, k, v = torch.randn(3, 2, 4, length, 16).unbind()
    cache = ft.KVCache.allocate(1, 2, 4, length, 16)
    steps = [
        ft.attention_decode(q[:, :, i : i + 1], cache,
                            new_key=k[:, :, i : i + 1], new_value=v[:, :, i : i + 1])
        for i in range(length)
    ]  # fmt: skip
    want = ft.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(torch.cat(steps, 2), want)
    again = ft.KVCache.allocate(1, 2, 4, length, 16)
    torch.testing.assert_close(ft.attention_decode(q, again, new_key=k, new_value=v), want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_by_each_samples_position(interleaved):
    angle = torch.rand(20, 4, dtype=torch.float64)
    tables = angle.cos(), angle.sin()
    cache, plain = filled(), filled()
    plain.keys.copy_(cache.keys)
    plain.values.copy_(cache.values)
    q, k, v = new(2)
    out = ft.attention_decode(
        q, cache, layer=1, new_key=k, new_value=v, rotary=tables, rotary_interleaved=interleaved
    )
    ids = torch.tensor([[3, 4], [5, 6]])
    turned = ft.rotary_embedding(q, k, *tables, interleaved=interleaved, position_ids=ids)
    want = ft.attention_decode(turned[0], plain, layer=1, new_key=turned[1], new_value=v)
    torch.testing.assert_close(out, want)
    # Fewer queries than new tokens: they are the last ones.
    cache = filled()
    last = ft.attention_decode(
        q[:, :, 1:], cache, layer=1, new_key=k, new_value=v, rotary=tables,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    cache.lengths[1] -= 2
    both = ft.attention_decode(
        q, cache, layer=1, new_key=k, new_value=v, rotary=tables, rotary_interleaved=interleaved
    )
    torch.testing.assert_close(last, both[:, :, 1:])


def test_cache_of_another_dtype_and_autocast():
    q, k, v = new(1, torch.float32)
    cache = filled(dtype=torch.bfloat16)
    out = ft.attention_decode(q, cache, layer=1, new_key=k, new_value=v)
    assert out.dtype == torch.float32 and cache.keys.dtype == torch.bfloat16
    assert "mixed_dtypes" in str(ft.explain("attention_decode", q, cache, layer=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.attention_decode(q, cache, layer=1).dtype == torch.bfloat16


def test_explain_writes_nothing_and_names_what_is_missing():
    cache, (q, k, v) = filled(dtype=torch.float32), new(2, torch.float32)
    q.requires_grad_()
    explanation = ft.explain("attention_decode", q, cache, layer=1, new_key=k, new_value=v)
    assert cache.lengths[1].tolist() == [3, 5]
    assert explanation.backend == "torch" and (
        "backward" in str(explanation) or not explanation.rejected
    )


@pytest.mark.parametrize("change, error, text", [
    ({"cache": torch.ones(3)}, TypeError, "cache must be a KVCache, got Tensor"),
    ({"layer": 2}, ValueError, "layer is 2; the cache has 2 layers"),
    ({"query": torch.ones(2, 4, 1, 8).int()}, TypeError, "query has dtype torch.int32"),
    ({"query": torch.ones(4, 1, 8)}, ValueError, "query has shape (4, 1, 8)"),
    ({"query": torch.ones(3, 4, 1, 8)}, ValueError, "the cache makes its batch 2"),
    ({"query": torch.ones(2, 3, 1, 8)}, ValueError, "the cache has 2 heads, which does not divide"),
    ({"new_value": None}, ValueError, "new_value is missing"),
    ({"new_key": torch.ones(2, 2, 1, 7)}, ValueError, "new_key has shape (2, 2, 1, 7)"),
    ({"new_key": torch.ones(2, 2, 2, 8)}, ValueError, "new_key has length 2, but new_value has 1"),
    ({"new_key": torch.ones(2, 2, 1, 8).half()}, TypeError, "new_key has dtype torch.float16"),
    ({"new_key": torch.ones(2, 2, 4, 8), "new_value": torch.ones(2, 2, 4, 6)}, ValueError,
     "the cache holds 5 tokens of a sample; 4 new ones exceed its capacity 8"),
    ({"mask": torch.ones(2, 1, 1, 7).bool()}, ValueError, "mask of shape (2, 1, 1, 7)"),
    ({"rotary": (torch.ones(5, 4), torch.ones(5, 4))}, ValueError, "positions 3 to 5; rotary's"),
    ({"rotary": (torch.ones(9, 3), torch.ones(9, 3))}, ValueError, "have width 3"),
    ({"rotary": torch.ones(1, 9, 4)}, ValueError, "rotary must be a pair of tables"),
    ({"sinks": torch.ones(2)}, ValueError, "sinks has shape (2,)"),
    ({"window": 3}, ValueError, "window is 3"),
    ({"layer": 0.5}, TypeError, "layer is 0.5; it must be an integer"),
    ({"scale": "0.5"}, TypeError, "scale"),
    ({"scale": [1.0]}, TypeError, "scale must be a number or None, got list"),
    ({"is_causal": "no"}, TypeError, "is_causal must be a bool, got str"),
    ({"softcap": "3"}, TypeError, "softcap must be a number or None, got str"),
])  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(change, error, text):
    q, k, v = new(1, torch.float32)
    cache = filled(dtype=torch.float32)
    keys = cache.keys.clone()
    arguments = {"query": q, "cache": cache, "layer": 1, "new_key": k, "new_value": v}
    refuses("attention_decode", arguments, change, error, text)
    assert cache.lengths.tolist() == [[0, 0], [3, 5]]
    torch.testing.assert_close(cache.keys, keys, equal_nan=True)


def fields(**changes):
    """The fields of a cache that fits, some of them changed."""
    cache = ft.KVCache.allocate(2, 2, 3, 8, 4, 6)
    return {"keys": cache.keys, "values": cache.values, "lengths": cache.lengths, **changes}


BY_HAND = {
    "no tensor": ({"lengths": [0, 0]}, TypeError, "lengths must be a tensor, got list"),
    "rank": ({"keys": torch.zeros(2, 3, 8, 4)}, ValueError, "keys has shape (2, 3, 8, 4)"),
    "last stride": (
        {"keys": torch.zeros(2, 2, 3, 4, 8).mT}, ValueError, "keys has strides (192, 96, 32, 1, 8)"
    ),
    "last stride of values": (
        {"values": torch.zeros(2, 2, 3, 8, 12)[..., ::2]}, ValueError, "values has strides"
    ),
    "integers": ({"keys": torch.zeros(2, 2, 3, 8, 4).int()}, ValueError, "keys has dtype"),
    "dtypes differ": (
        {"values": torch.zeros(2, 2, 3, 8, 6).half()}, ValueError,
        "values has dtype torch.float16, but keys has torch.float32",
    ),
    "smaller capacity": (
        {"values": torch.zeros(2, 2, 3, 7, 6)}, ValueError, "values has shape (2, 2, 3, 7, 6)"
    ),
    "fewer heads": (
        {"values": torch.zeros(2, 2, 2, 8, 6)}, ValueError, "values has shape (2, 2, 2, 8, 6)"
    ),
    "lengths int64": (
        {"lengths": torch.zeros(2, 2).long()}, ValueError, "lengths has dtype torch.int64"
    ),
    "lengths int16": (
        {"lengths": torch.zeros(2, 2).short()}, ValueError, "lengths has dtype torch.int16"
    ),
    "lengths float": (
        {"lengths": torch.zeros(2, 2)}, ValueError, "lengths has dtype torch.float32"
    ),
    "lengths strided": (
        {"lengths": torch.zeros(2, 4).int()[:, ::2]}, ValueError, "lengths has strides (4, 2)"
    ),
    "lengths of others": (
        {"lengths": torch.zeros(2, 3).int()}, ValueError, "lengths has shape (2, 3)"
    ),
    "devices differ": (
        {"values": torch.zeros(2, 2, 3, 8, 6, device="meta")}, ValueError, "values is on meta"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_f4_a_cache_made_by_hand_is_checked(name):
    """When it is made, and at the call where a field is replaced, or a subclass gathers it."""
    change, error, text = BY_HAND[name]
    with pytest.raises(error) as caught:
        ft.KVCache(**fields(**change))
    assert str(caught.value).startswith("KVCache: ") and text in str(caught.value)

    cache, query = ft.KVCache(**fields()), torch.ones(2, 3, 1, 4)
    for field, value in change.items():
        setattr(cache, field, value)
    if not isinstance(cache.lengths, list):
        with pytest.raises(error, match=r"^KVCache: "):
            ft.attention_decode(query, cache)

    class Pages(ft.KVCache):
        def layer(self, layer):
            found = fields(**change)
            return found["keys"][layer], found["values"][layer], found["lengths"][layer]

    if name not in ("rank", "no tensor"):
        with pytest.raises(error, match=r"^KVCache: "):
            ft.attention_decode(query, Pages(**fields()))


def test_f4_what_cant_be_appended_to_is_refused_before_it_is_written():
    keys, values = torch.zeros(2, 1, 2, 3, 8, 4).unbind()
    new_key, new_value = torch.ones(2, 2, 3, 1, 4).unbind()
    query, lengths = torch.ones(2, 3, 1, 4), torch.zeros(1, 2, dtype=torch.int32)
    negative = torch.tensor([[-1, -1]], dtype=torch.int32)
    one = values[:, :1].expand(1, 2, 3, 8, 4)
    for given, text in (
        ((keys, one, lengths), "values is expanded"),
        ((keys, keys, lengths), "keys and values share memory"),
        ((keys, values, negative), "lengths holds -1"),
    ):
        cache = ft.KVCache(*given)
        with pytest.raises(ValueError, match=rf"^KVCache: {text}"):
            ft.attention_decode(query, cache, new_key=new_key, new_value=new_value)
        assert not keys.any() and not values.any() and not lengths.any()
    filled_lengths = torch.full((1, 2), 3, dtype=torch.int32)
    shared = ft.KVCache(keys, one, filled_lengths)  # to read it is all right
    copied = ft.KVCache(keys, one.contiguous(), filled_lengths)
    assert torch.equal(ft.attention_decode(query, shared), ft.attention_decode(query, copied))


@pytest.mark.parametrize("on", backends_of("attention_decode"))
def test_f7_a_window_beyond_any_length_is_unbounded(on):
    q, k, v = new(2, torch.float32)
    outs = []
    for window in (None, (sys.maxsize, sys.maxsize), (2**70, None)):
        with running_on(on), torch.no_grad():
            cache = filled(dtype=torch.float32)
            torch.manual_seed(1)
            cache.keys.normal_()
            cache.values.normal_()
            outs.append(
                ft.attention_decode(q, cache, layer=1, new_key=k, new_value=v, window=window)
            )
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_no_tokens_to_turn_back_to():
    cache = filled()
    tables = torch.ones(9, 4, dtype=torch.float64), torch.ones(9, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="positions -1 to 4"):
        ft.attention_decode(new(4)[0], cache, layer=1, rotary=tables)
