"""The reference's attention forms: against a loop, torch's own function, and each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_reference import INF, NAN, SEED, close, gradients, python_philox, rand
from torch.autograd import gradcheck

from fasttransformer import reference
from fasttransformer.reference.attention_decode import KVCache

# -------------------------------------------------------------------------------------- attention


def loop_attention(
    query, key, value, *, mask=None, bias=None, is_causal=False, causal_alignment="top_left",
    window=None, softcap=None, alibi_slopes=None, sinks=None, key_lengths=None, scale=None,
    dropout_p=0.0, seed=None,
):  # fmt: skip
    """Attention as one would explain it on paper, number by number."""
    (batch, heads, queries, size), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -INF, dtype=torch.float64)
    if sinks is not None:  # what a row without a key has left
        lse[:] = sinks.detach().double()[:, None]
    scale = size**-0.5 if scale is None else scale
    full = (batch, heads, queries, keys)
    left, right = window or (None, None)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                at = i + (keys - queries if causal_alignment == "bottom_right" else 0)
                scores = {}
                for j in range(keys):
                    s = scale * sum(
                        float(a) * float(c) for a, c in zip(query[b, h, i], key[b, h // group, j])
                    )
                    if softcap:
                        s = softcap * math.tanh(s / softcap)
                    if alibi_slopes is not None:
                        s -= float(alibi_slopes.expand(batch, heads)[b, h]) * abs(j - at)
                    if bias is not None:
                        s += float(bias.expand(full)[b, h, i, j])
                    seen = mask is None or bool(mask.expand(full)[b, h, i, j])
                    seen &= not (is_causal and j > at)
                    seen &= left is None or j >= at - left
                    seen &= right is None or j <= at + right
                    seen &= key_lengths is None or j < int(key_lengths[b])
                    if seen and s != -INF:
                        scores[j] = s
                if not scores:
                    continue
                total = sum(math.exp(s) for s in scores.values())
                total += math.exp(float(sinks[h])) if sinks is not None else 0.0
                lse[b, h, i] = math.log(total)
                for j, s in scores.items():
                    weight = math.exp(s) / total
                    if dropout_p:
                        position = ((b * heads + h) * queries + i) * keys + j
                        kept = python_philox(int(seed), position) >= int(dropout_p * 2**32)
                        weight = weight / (1 - dropout_p) if kept else 0.0
                    out[b, h, i] += weight * value[b, h // group, j].detach()
    return out, lse


def attention_options():
    yield "plain", {}
    yield "scale", {"scale": 0.3}
    yield "mask", {"mask": torch.rand(2, 4, 3, 5) > 0.4}
    yield "mask-broadcast", {"mask": torch.rand(2, 1, 1, 5) > 0.4}
    yield "mask-empty-row", {"mask": torch.tensor([1, 0, 1]).bool()[:, None]}
    yield "bias", {"bias": rand(4, 3, 5)}
    yield "bias-1d", {"bias": rand(5)}
    yield "bias-inf", {"bias": torch.where(torch.rand(2, 4, 3, 5) > 0.5, 0.5, -INF)}
    for alignment in ("top_left", "bottom_right"):
        at = {"causal_alignment": alignment}
        yield f"causal-{alignment}", {"is_causal": True, **at}
        yield f"window-{alignment}", {"window": (1, 1), **at}
        yield f"window-left-{alignment}", {"window": (1, None), "is_causal": True, **at}
        yield f"alibi-{alignment}", {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 0.0]), **at}
    yield "window-right", {"window": (None, 0)}
    for scale in (0.0, -0.001, -0.5):
        yield f"causal-scale{scale}", {"is_causal": True, "scale": scale}
        yield f"mask-scale{scale}", {"mask": torch.rand(3, 5) > 0.4, "scale": scale}
    yield "softcap", {"softcap": 0.7}
    yield "alibi-per-sample", {"alibi_slopes": torch.rand(2, 4)}
    yield "sinks", {"sinks": rand(4)}
    yield "sinks-empty-row", {"sinks": rand(4), "mask": torch.tensor([1, 0, 1]).bool()[:, None]}
    yield "lengths", {"key_lengths": torch.tensor([3, 0])}
    yield "dropout", {"dropout_p": 0.4, "seed": SEED}
    yield (
        "all",
        {
            "mask": torch.rand(2, 4, 3, 5) > 0.3, "bias": rand(2, 1, 3, 5), "is_causal": True,
            "causal_alignment": "bottom_right", "window": (2, 5), "softcap": 1.5,
            "alibi_slopes": torch.rand(4), "sinks": rand(4), "key_lengths": torch.tensor([5, 4]),
            "scale": 0.4, "dropout_p": 0.2, "seed": SEED,
        },
    )  # fmt: skip


torch.manual_seed(1)
OPTIONS = dict(attention_options())


@pytest.mark.parametrize("case", OPTIONS)
def test_attention_equals_the_loop(case):
    query, key, value = rand(2, 4, 3, 6), rand(2, 2, 5, 6), rand(2, 2, 5, 7)
    out, lse = reference.attention(query, key, value, return_lse=True, **OPTIONS[case])
    want_out, want_lse = loop_attention(query, key, value, **OPTIONS[case])
    close(out, want_out)
    close(lse, want_lse)
    close(reference.attention(query, key, value, **OPTIONS[case]), want_out)


@pytest.mark.parametrize("case", OPTIONS)
def test_attention_gradients(case):
    options = dict(OPTIONS[case])
    query, key = rand(2, 4, 3, 2, grad=True), rand(2, 2, 5, 2, grad=True)
    value = rand(2, 2, 5, 3, grad=True)
    learned = [
        name for name in ("bias", "sinks") if name in options and options[name].isfinite().all()
    ]
    extra = [options.pop(name).clone().requires_grad_() for name in learned]

    def run(*inputs):
        named = dict(zip(learned, inputs[3:], strict=True))
        out, lse = reference.attention(*inputs[:3], return_lse=True, **named, **options)
        return out, torch.where(lse.isinf(), 0.0, lse)

    with torch.autograd.detect_anomaly(check_nan=True):
        assert gradcheck(run, (query, key, value, *extra), fast_mode=True)


def test_second_derivative_of_a_masked_row_is_finite():
    mask = torch.tensor([[True, False], [False, False]])
    inputs = [rand(1, 1, 2, 2, grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(
        lambda *qkv: reference.attention(*qkv, mask=mask), inputs, fast_mode=True
    )


@pytest.mark.parametrize("additive", [False, True])
def test_attention_row_without_key(additive):
    """pytorch/pytorch#103749."""
    query, key, value = rand(1, 2, 6, 8, grad=True), rand(1, 2, 10, 8, grad=True), rand(1, 2, 10, 8)
    mask = torch.ones(6, 10).tril().bool()
    mask[5] = False
    how = {"bias": torch.where(mask, 0.0, -INF)} if additive else {"mask": mask}
    sinks = rand(2, grad=True)
    out, lse = reference.attention(query, key, value, return_lse=True, sinks=sinks, **how)
    assert not out[:, :, 5].any() and torch.equal(lse[:, :, 5], sinks.expand(1, 2))
    kept = reference.attention(query[:, :, :5], key, value, mask=mask[:5], sinks=sinks)
    close(out[:, :, :5], kept)
    d_query, d_key, d_sinks = torch.autograd.grad(out.sum(), (query, key, sinks))
    assert not d_query[:, :, 5].any()
    for got, want in zip(
        (d_query, d_key, d_sinks),
        torch.autograd.grad(kept.sum(), (query, key, sinks)),
        strict=True,
    ):
        close(got, want)


def test_attention_bias_of_finfo_min_is_a_number():
    """pytorch/pytorch#110213."""
    query, key, value = (rand(1, 1, 3, 4, dtype=torch.float32) for _ in range(3))
    bias = torch.ones(3, 3)
    bias[0] = torch.finfo(torch.float32).min
    out, lse = reference.attention(query, key, value, bias=bias, return_lse=True)
    close(out[:, :, 0], value.mean(2), 1e-6)
    assert lse.isfinite().all()


@pytest.mark.parametrize("poison", [1e10, INF, -INF, NAN])
@pytest.mark.parametrize("how", ["mask", "bias", "key_lengths", "window", "causal"])
def test_attention_keys_that_no_query_sees_are_not_felt(poison, how):
    """pytorch/pytorch#101967, in outputs and gradients, key and value."""
    mask = torch.tensor([True, True, False])
    option = {
        "mask": {"mask": mask},
        "bias": {"bias": torch.where(mask, 0.5, -INF)},
        "key_lengths": {"key_lengths": torch.tensor([2])},
        "window": {"window": (None, 0)},
        "causal": {"is_causal": True},
    }[how]

    def run(value_of_last):
        query, key, value = q.clone(), k.clone(), v.clone()
        key[:, :, 2] = value_of_last
        value[:, :, 2] = value_of_last
        inputs = [t.requires_grad_() for t in (query, key, value)]
        out, lse = reference.attention(*inputs, return_lse=True, **option)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)]

    q, k, v = rand(1, 2, 2, 4), rand(1, 2, 3, 4), rand(1, 2, 3, 4)
    for poisoned, clean in zip(run(poison), run(0.0), strict=True):
        assert torch.equal(poisoned, clean)


def test_attention_key_that_some_queries_see_is_felt_by_them_alone():
    query, key, value = rand(1, 1, 4, 4), rand(1, 1, 4, 4), rand(1, 1, 4, 4)
    clean = reference.attention(query, key, value, is_causal=True)
    key[0, 0, 2] = NAN
    out = reference.attention(query, key, value, is_causal=True)
    assert torch.equal(out[:, :, :2], clean[:, :, :2]) and out[:, :, 2:].isnan().all()


def test_attention_query_row_of_nan_stays_in_its_row():
    query, key, value = rand(1, 2, 4, 4), rand(1, 2, 4, 4), rand(1, 2, 4, 4)
    clean = reference.attention(query, key, value)
    query[0, 1, 2] = NAN
    out = reference.attention(query, key, value)
    assert out[0, 1, 2].isnan().all()
    assert torch.equal(out.isnan().sum(), torch.tensor(4))
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize("shape", [(1, 4, 1, 6), (6, 6), (3, 1, 6, 6), (), (6,)])
def test_attention_gradient_of_a_broadcast_bias(shape):
    """facebookresearch/xformers#783."""
    query, key, value = rand(3, 4, 6, 8), rand(3, 4, 6, 8), rand(3, 4, 6, 8)
    bias = rand(*shape, grad=True)
    full = bias.detach().expand(3, 4, 6, 6).clone().requires_grad_()
    (got,) = torch.autograd.grad(reference.attention(query, key, value, bias=bias).sum(), bias)
    (want,) = torch.autograd.grad(reference.attention(query, key, value, bias=full).sum(), full)
    close(got, want.sum_to_size(shape))


@pytest.mark.parametrize("batch, heads, queries, keys, size", [
    (0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4), (2, 2, 3, 0, 4), (2, 2, 0, 0, 4),
    (1, 1, 2, 2, 0),
])  # fmt: skip
@pytest.mark.parametrize("option", [{}, {"is_causal": True}, {"mask": torch.tensor(True)}])
def test_attention_of_nothing(batch, heads, queries, keys, size, option):
    query = rand(batch, heads, queries, size, grad=True)
    key, value = rand(batch, heads, keys, size), rand(batch, heads, keys, 5)
    out, lse = reference.attention(query, key, value, return_lse=True, **option)
    assert out.shape == (batch, heads, queries, 5) and lse.shape == (batch, heads, queries)
    if keys == 0:
        assert not out.any() and (lse == -INF).all()
    assert not out.isnan().any()
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert not grad.isnan().any()


def test_attention_is_equivariant_to_the_order_of_keys():
    query, key, value, bias = rand(1, 2, 3, 4), rand(1, 2, 6, 4), rand(1, 2, 6, 4), rand(3, 6)
    order = torch.randperm(6)
    shuffled = reference.attention(query, key[:, :, order], value[:, :, order], bias=bias[:, order])
    close(reference.attention(query, key, value, bias=bias), shuffled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_dtypes(dtype):
    query, key, value = (rand(2, 2, 5, 8).to(dtype).requires_grad_() for _ in range(3))
    bias = rand(5, 5).to(dtype).requires_grad_()
    out, lse = reference.attention(query, key, value, bias=bias, is_causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide = [t.detach().double() for t in (query, key, value)]
    want = reference.attention(*wide, bias=bias.detach().double(), is_causal=True)
    close(out.double(), want, max(2 * torch.finfo(dtype).eps, 1e-6))
    for grad in torch.autograd.grad(out.sum(), (query, key, value, bias)):
        assert grad.dtype == dtype


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("how", ["plain", "causal", "bool", "float"])
def test_scaled_dot_product_attention_equals_torch(leading, how):
    query, key = rand(*leading, 4, 6, grad=True), rand(*leading, 5, 6, grad=True)
    value = rand(*leading, 5, 3, grad=True)
    keep = torch.rand(*leading, 4, 5) > 0.3
    options = {
        "plain": {},
        "causal": {"is_causal": True, "scale": 0.3},
        "bool": {"attn_mask": keep},
        "float": {"attn_mask": torch.where(keep, rand(4, 5), -INF)},
    }[how]
    out = reference.scaled_dot_product_attention(query, key, value, **options)
    want = F.scaled_dot_product_attention(query, key, value, **options)
    close(out, want)
    for got, expected in zip(
        gradients(out, query, key, value), gradients(want, query, key, value), strict=True
    ):
        close(got, expected)


def test_scaled_dot_product_attention_of_grouped_heads():
    query, key, value = rand(2, 6, 4, 8), rand(2, 2, 5, 8), rand(2, 3, 5, 8)
    out = reference.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    repeated = F.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(2, 1)
    )
    close(out, repeated)
    with pytest.raises(ValueError, match="exclude"):
        reference.scaled_dot_product_attention(
            *[query[0]] * 3, attn_mask=torch.ones(4, 4).bool(), is_causal=True
        )


# --------------------------------------------------------------- attention_varlen, merge, decode

LENGTHS = [([0, 1, 0, 1], [0, 3, 0, 5]), ([4, 3, 1], [4, 5, 0]), ([0, 0], [0, 0]), ([], []),
           ([2], [0])]  # fmt: skip


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_attention_varlen_equals_one_call_per_sequence(lengths_q, lengths_k, alignment):
    """Dao-AILab/flash-attention#1537."""
    query = rand(sum(lengths_q), 4, 6, grad=True)
    key, value = rand(sum(lengths_k), 2, 6, grad=True), rand(sum(lengths_k), 2, 3, grad=True)
    samples = len(lengths_q)
    bias = rand(samples, 1, max(lengths_q, default=0), max(lengths_k, default=0))
    options = {"is_causal": True, "causal_alignment": alignment, "sinks": rand(4)}
    slopes = torch.rand(samples, 4)
    out, lse = reference.attention_varlen(
        query, key, value, cumulative(lengths_q), cumulative(lengths_k),
        bias=bias, alibi_slopes=slopes, return_lse=True, **options,
    )  # fmt: skip
    assert out.shape == (sum(lengths_q), 4, 3) and lse.shape == (sum(lengths_q), 4)
    at_q = at_k = 0
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        want, want_lse = reference.attention(
            query[None, at_q : at_q + n].transpose(1, 2),
            key[None, at_k : at_k + m].transpose(1, 2),
            value[None, at_k : at_k + m].transpose(1, 2),
            bias=bias[b : b + 1, :, :n, :m], alibi_slopes=slopes[b], return_lse=True, **options,
        )  # fmt: skip
        close(out[at_q : at_q + n], want[0].transpose(0, 1))
        close(lse[at_q : at_q + n], want_lse[0].transpose(0, 1))
        at_q, at_k = at_q + n, at_k + m
    for grad in torch.autograd.grad(out.sum(), (query, key, value), allow_unused=True):
        assert grad is None or grad.isfinite().all()


def test_attention_varlen_equals_the_padded_call_with_dropout():
    lengths_q, lengths_k = [3, 2], [2, 4]
    query, key, value = rand(2, 4, 3, 6), rand(2, 2, 4, 6), rand(2, 2, 4, 6)
    padded = reference.attention(
        query, key, value, key_lengths=torch.tensor(lengths_k), dropout_p=0.3, seed=SEED
    )

    def pack(x, lengths):
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])

    out = reference.attention_varlen(
        pack(query, lengths_q), pack(key, lengths_k), pack(value, lengths_k),
        cumulative(lengths_q), cumulative(lengths_k), dropout_p=0.3, seed=SEED,
    )  # fmt: skip
    close(out, pack(padded, lengths_q))


def test_merge_attention_of_splits_equals_the_whole():
    query, key, value = (rand(2, 2, n, 4, grad=True) for n in (3, 9, 9))
    mask = torch.rand(2, 1, 3, 9) > 0.5
    mask[0, 0, 1] = False  # a row without any key
    mask[0, 0, 2, :4] = False  # a row without a key in the first part
    whole, whole_lse = reference.attention(query, key, value, mask=mask, return_lse=True)
    parts = [
        reference.attention(
            query, key[:, :, part], value[:, :, part], mask=mask[..., part], return_lse=True
        )
        for part in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 9))
    ]
    out, lse = reference.merge_attention(*zip(*parts, strict=True))
    close(out, whole)
    close(lse, whole_lse)
    stacked = [torch.stack(tensors) for tensors in zip(*parts, strict=True)]
    close(reference.merge_attention(*stacked)[0], whole)
    with torch.autograd.detect_anomaly(check_nan=True):
        merged_grads = gradients(out, query, key, value)
    for got, want in zip(merged_grads, gradients(whole, query, key, value), strict=True):
        close(got, want)


def test_merge_attention_gradients():
    outs, lses = rand(3, 2, 4, grad=True), rand(3, 2, grad=True)
    assert gradcheck(reference.merge_attention, (outs, lses))


@pytest.mark.parametrize("chunks", [[1] * 6, [3, 1, 2], [6]])
@pytest.mark.parametrize("option", [{}, {"window": (2, None)}, {"alibi_slopes": torch.rand(4)}])
def test_attention_decode_step_by_step_equals_one_long_call(chunks, option):
    query, key, value = rand(2, 4, 6, 8), rand(2, 2, 6, 8), rand(2, 2, 6, 3)
    angle = torch.rand(16, 4, dtype=torch.float64)
    rotary = (angle.cos(), angle.sin())
    turned = reference.rotary_embedding(query, key, *rotary)
    want = reference.attention(*turned, value, is_causal=True, **option)
    cache = KVCache.allocate(2, 2, 2, 16, 8, 3, dtype=torch.float64)
    cache.keys.fill_(NAN)  # what isn't filled is never felt
    cache.values.fill_(NAN)
    at, outs = 0, []
    for n in chunks:
        q, k, v = (x[:, :, at : at + n] for x in (query, key, value))
        outs.append(
            reference.attention_decode(
                q, cache, layer=1, new_key=k, new_value=v, rotary=rotary, **option
            )
        )
        at += n
    close(torch.cat(outs, dim=2), want)
    assert cache.lengths.tolist() == [[0, 0], [6, 6]]
    last = reference.attention_decode(
        query[:, :, 4:], cache, layer=1, rotary=rotary, return_lse=True, **option
    )
    close(last[0], want[:, :, 4:])
    with pytest.raises(ValueError, match="capacity 16"):
        cache.append(1, rand(2, 2, 11, 8), rand(2, 2, 11, 3))
    assert cache.lengths[1].tolist() == [6, 6]


def test_attention_decode_samples_of_different_length():
    cache = KVCache.allocate(1, 2, 1, 8, 4, dtype=torch.float64)
    cache.keys.normal_()
    cache.values.normal_()
    cache.lengths.copy_(torch.tensor([[5, 0]]))
    before = cache.keys.clone(), cache.values.clone()
    query, key, value = rand(2, 1, 1, 4), rand(2, 1, 1, 4), rand(2, 1, 1, 4)
    out = reference.attention_decode(query, cache, new_key=key, new_value=value)
    close(out[1], value[1])
    keys = torch.cat([before[0][0, :1, :, :5], key[:1]], dim=2)
    values = torch.cat([before[1][0, :1, :, :5], value[:1]], dim=2)
    close(out[:1], reference.attention(query[:1], keys, values))
    assert torch.equal(cache.keys[0, 1, :, 1:], before[0][0, 1, :, 1:])
