"""attention_decode in graphs, which can't take their way by the numbers that a cache holds: the
same numbers as in eager mode, into the cache too, and what doesn't fit is refused, unwritten."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fasttransformer as ft

HEADS, KV_HEADS, DIM, VALUE_DIM, CAPACITY = 4, 2, 8, 6, 12
ANGLES = torch.rand(CAPACITY, DIM // 2)
TABLES = ANGLES.cos(), ANGLES.sin()


def filled(*lengths, layers=2, dtype=torch.float32):
    """A cache whose samples hold ``lengths`` tokens, and NaN behind them."""
    cache = ft.KVCache.allocate(
        layers, len(lengths), KV_HEADS, CAPACITY, DIM, VALUE_DIM, dtype=dtype
    )
    torch.manual_seed(1)
    for tensor in (cache.keys, cache.values):
        tensor.normal_()
        for b, length in enumerate(lengths):
            tensor[:, b, :, max(length, 0) :] = float("nan")
    cache.lengths.copy_(torch.tensor(lengths))
    return cache


def tokens(count, dtype=torch.float32):
    """query, new_key, new_value."""
    shapes = ((HEADS, count, DIM), (KV_HEADS, count, DIM), (KV_HEADS, count, VALUE_DIM))
    return [torch.randn(2, *shape).to(dtype) for shape in shapes]


def appending(**options):
    def step(cache, query, key, value):
        return ft.attention_decode(query, cache, new_key=key, new_value=value, **options)

    return step


def two_layers(cache, query, key, value):
    given = {"new_key": key, "new_value": value, "rotary": TABLES}
    first = ft.attention_decode(query, cache, layer=0, **given)
    return first, ft.attention_decode(2 * query, cache, layer=1, **given)


CALLS = {
    "plain": appending(),
    "lse, mask": appending(return_lse=True, mask=torch.rand(2, 1, 1, CAPACITY) < 0.8),
    "rotary": appending(rotary=TABLES),
    "rotary, fewer queries": lambda cache, query, key, value: appending(rotary=TABLES)(
        cache, query[:, :, -1:], key, value
    ),
    "bias, window": appending(bias=torch.randn(HEADS, 1, CAPACITY), window=(3, 0)),
    "two layers": two_layers,
    "nothing new": lambda cache, query, key, value: ft.attention_decode(query, cache, layer=1),
    "no kernel": appending(backend="torch"),
    "no kernel, nothing new": lambda cache, query, key, value: ft.attention_decode(
        query, cache, backend="torch"
    ),
}


def same(got, want):
    torch.testing.assert_close(got, want, equal_nan=True)


def same_caches(got, want):
    same((got.keys, got.values, got.lengths), (want.keys, want.values, want.lengths))


MODES = [(name, True, torch.float32, False) for name in CALLS]
MODES += [("plain", None, torch.float32, False), ("plain", None, torch.bfloat16, False)]
MODES += [("lse, mask", True, torch.float32, True), ("two layers", None, torch.float32, True)]


@pytest.mark.parametrize("name, dynamic, dtype, grad", MODES, ids=str)
def test_f13_compiled(name, dynamic, dtype, grad):
    """A step of two tokens and steps of one, by samples of one length and of two; each leaves the
    cache as the eager call does, which is followed by an eager call."""
    torch._dynamo.reset()
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((3, 3), (2, 5)):
        ours, theirs = filled(*lengths, dtype=dtype), filled(*lengths, dtype=dtype)
        for count in (2, 1, 1):
            given = tokens(count)
            for x in given:
                x.requires_grad_(grad)
            got, want = compiled(ours, *given), call(theirs, *given)
            same(got, want)
            same_caches(ours, theirs)
            if grad:
                same(*(gradient(outs, given[0]) for outs in (got, want)))
        given = tokens(1)
        same(call(ours, *given), call(theirs, *given))
        same_caches(ours, theirs)


def gradient(outs, query):
    outs = outs if isinstance(outs, tuple) else (outs,)
    return torch.autograd.grad(sum(out.square().sum() for out in outs), query)


def test_f13_compiled_by_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True)
    ours, theirs = filled(2, CAPACITY - 2), filled(2, CAPACITY - 2)
    for _ in range(2):
        given = tokens(1)
        got, written = run_and_get_code(compiled, ours, *given)
        same(got, two_layers(theirs, *given))
        same_caches(ours, theirs)
        # The cache is written in place: no memory of its size is asked for.
        allocated = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", "".join(written))
        assert not [sizes for sizes in allocated if str(CAPACITY) in sizes.split(", ")]
    with pytest.raises(ValueError, match=r"attention_decode: cache.lengths, before the new tokens"):
        compiled(ours, *tokens(1))
    same_caches(ours, theirs)


REFUSED = {
    "full": (CALLS["plain"], 1, (3, CAPACITY), "holds 12; it must be in [0, 12)"),
    "more than the capacity": (CALLS["plain"], 13, (0, 0), "holds 0; it must be in [0, 0)"),
    "negative": (CALLS["plain"], 1, (-1, 4), "holds -1; it must be in [0, 12)"),
    "beyond": (CALLS["nothing new"], 1, (4, 1000), "holds 1000; it must be in [0, 13)"),
    "beyond, no kernel": (CALLS["no kernel, nothing new"], 1, (4, 13), "it must be in [0, 13)"),
    "rotary": (
        appending(rotary=[table[:5] for table in TABLES]), 1, (3, 5),
        "first positions in rotary's tables holds 5; it must be in [0, 5)",
    ),
    "rotary, more queries": (
        lambda cache, query, key, value: appending(rotary=TABLES)(
            cache, query, key[:, :, 1:], value[:, :, 1:]
        ), 4, (3, 0), "holds -1; it must be in [0, 9)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_f13_what_does_not_fit_is_refused_and_nothing_is_written(name):
    torch._dynamo.reset()
    call, count, lengths, text = REFUSED[name]
    given, cache = tokens(count), filled(*lengths)
    with pytest.raises(ValueError, match=r"^(attention_decode|KVCache): "):
        call(cache, *given)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError) as caught:
        compiled(cache, *given)
    assert str(caught.value).startswith("attention_decode: ") and text in str(caught.value)
    same_caches(cache, filled(*lengths))


@pytest.mark.parametrize("how", ["one tensor", "one memory", "expanded"])
def test_f13_what_cant_be_appended_to_is_refused(how):
    torch._dynamo.reset()
    keys = torch.zeros(1, 2, KV_HEADS, CAPACITY, DIM)
    values = {"one tensor": keys, "one memory": keys[:], "expanded": keys[:, :1].expand_as(keys)}
    cache = ft.KVCache(keys, values[how], torch.zeros(1, 2, dtype=torch.int32))
    query, key, _ = tokens(1)
    compiled = torch.compile(appending(), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"KVCache: (keys and values share memory|values is expand)"
    ):
        compiled(cache, query, key, key)
    assert not keys.any() and not cache.lengths.any()


def test_f13_fields_that_are_replaced_and_caches_made_in_the_graph():
    torch._dynamo.reset()
    call = CALLS["rotary"]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, theirs = filled(3, 3), filled(3, 3)
    for lengths in ((3, 3), (5, 1), (2, 2)):
        for cache in (ours, theirs):
            cache.keys, cache.values = cache.keys.clone(), cache.values.clone()
            cache.keys.nan_to_num_()
            cache.lengths = torch.tensor([lengths] * 2, dtype=torch.int32)
        given = tokens(2)
        same(compiled(ours, *given), call(theirs, *given))
        same_caches(ours, theirs)

    def prompt(query, key, value):
        cache = ft.KVCache.allocate(1, 2, KV_HEADS, CAPACITY, DIM, VALUE_DIM)
        out = ft.attention_decode(query, cache, new_key=key, new_value=value)
        return out, cache.keys, cache.lengths

    given = tokens(5)
    same(torch.compile(prompt, fullgraph=True, backend="aot_eager")(*given), prompt(*given))


def test_f13_an_append_of_ones_own():
    torch._dynamo.reset()

    class Doubling(ft.KVCache):
        def append(self, layer, new_key, new_value):
            self.keys[layer, :, :, :1] = 2 * new_key
            self.values[layer, :, :, :1] = 2 * new_value
            self.lengths[layer] += 1

    ours, theirs = (Doubling(c.keys, c.values, c.lengths) for c in (filled(0, 0), filled(0, 0)))
    given = tokens(1)
    got = torch.compile(appending(), fullgraph=True, backend="aot_eager")(ours, *given)
    same(got, appending()(theirs, *given))
    same_caches(ours, theirs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["plain", "rotary", "nothing new"])
def test_f13_traced(name):
    """torch.jit.trace used to keep the positions of the call that it recorded."""
    ours, theirs = filled(1, 2), filled(1, 2)
    recorded = filled(4, 4)
    call, given = CALLS[name], tokens(1)

    def of_tensors(keys, values, lengths, *given):
        return call(ft.KVCache(keys, values, lengths), *given)

    fields = (recorded.keys, recorded.values, recorded.lengths)
    traced = torch.jit.trace(of_tensors, (*fields, *given), check_trace=False)
    for _ in range(3):
        given = tokens(1)
        same(traced(ours.keys, ours.values, ours.lengths, *given), call(theirs, *given))
        same_caches(ours, theirs)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_f13_exported(strict):
    class Step(torch.nn.Module):
        def forward(self, keys, values, lengths, query, key, value):
            cache = ft.KVCache(keys, values, lengths)
            return ft.attention_decode(query, cache, new_key=key, new_value=value, rotary=TABLES)

    ours, theirs, given = filled(1, 2), filled(1, 2), tokens(1)
    fields = (ours.keys, ours.values, ours.lengths)
    program = torch.export.export(Step(), (*fields, *given), strict=strict)
    for _ in range(2):
        same(program.module()(*fields, *given), CALLS["rotary"](theirs, *given))
        same_caches(ours, theirs)


def test_f13_operator_keeps_torchs_rules():
    cache, (_, key, value) = filled(1, 2), tokens(2)
    operator = torch.ops.fasttransformer.append_to_cache.default
    fields = (cache.keys.nan_to_num(), cache.values.nan_to_num(), cache.lengths)
    torch.library.opcheck(operator, (*fields, 1, cache.lengths[1].long(), key, value))
