"""Sinks and queries without keys: lse is the sink, so parts of the keys merge to the whole."""

import pytest
import torch

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference

OPTIONS = {
    "mask": lambda n: {"mask": torch.arange(16) >= 16},
    "bias": lambda n: {"bias": torch.full((16,), float("-inf"))},
    "key_lengths": lambda n: {"key_lengths": torch.zeros(n, dtype=torch.int32)},
    "window": lambda n: {"window": (0, 0), "key_lengths": torch.full((n,), 2)},
    "some rows": lambda n: {"mask": torch.arange(3)[:, None] + torch.arange(16) >= 16},
}


def tensors(keys=16, dtype=torch.float32):
    """query, key, value, and a sink for each head: an ordinary one, one beyond ±64, and none."""
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (3, keys, keys))
    return query, key, value, torch.tensor([0.7, -90.0, float("-inf")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("on", backends_of("attention"))
def test_b79_lse_of_a_query_without_keys_is_its_sink(on, option, dtype):
    def drawn():
        return [*tensors(dtype=dtype)[:3], torch.tensor([0.7, -90.0, 2.0])]

    query, key, value, sinks = tensors(dtype=dtype)
    options = OPTIONS[option](2)

    def attend(ops):
        return lambda q, k, v, s: ops.attention(q, k, v, sinks=s, return_lse=True, **options)

    check(attend(ft), attend(reference), drawn(), on=on, redraw=drawn)
    if option in ("window", "some rows"):
        return
    with running_on(on):
        out, lse = attend(ft)(query, key, value, sinks)
    assert torch.equal(lse, sinks[:, None].expand(2, 3, 3))
    assert not out.any()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("on", backends_of("attention"))
def test_b79_no_keys_at_all(on, bias):
    query, key, value, sinks = tensors(keys=0)
    options = {"bias": torch.randn(2, 3, 3, 1)} if bias else {}
    query, given = query.requires_grad_(), sinks.clone().requires_grad_()
    with running_on(on, launched=None):
        out, lse = ft.attention(query, key, value, sinks=given, return_lse=True, **options)
        d_query, d_sinks = torch.autograd.grad(lse[:, :2, :2].sum() + out.sum(), [query, given])
    want = reference.attention(query, key, value, sinks=sinks, return_lse=True, **options)[1]
    assert torch.equal(lse, sinks[:, None].expand(2, 3, 3)) and torch.equal(want, lse)
    assert not out.any() and not d_query.any()
    assert d_sinks.tolist() == [4.0, 4.0, 0.0]


@pytest.mark.parametrize("on", backends_of("attention_varlen"))
def test_b79_a_packed_sequence_without_keys(on):
    query, key, value = torch.randn(5, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    starts = torch.tensor([0, 3, 5]), torch.tensor([0, 0, 4])

    def attend(ops):
        return lambda q, k, v, s: ops.attention_varlen(q, k, v, *starts, sinks=s, return_lse=True)

    sinks = torch.tensor([0.5, -70.0])
    check(
        attend(ft), attend(reference), [query, key, value, sinks], on=on,
        redraw=lambda: [*map(torch.randn_like, (query, key, value)), sinks],
    )  # fmt: skip
    with running_on(on):
        lse = attend(ft)(query, key, value, sinks)[1]
    assert torch.equal(lse[:3], sinks.expand(3, 2)) and lse[3:].isfinite().all()


@pytest.mark.parametrize("on", backends_of("attention_decode"))
def test_b79_an_empty_cache(on):
    cache = ft.KVCache.allocate(1, 2, 2, 16, 8)
    sinks = torch.tensor([0.5, -70.0])
    with running_on(on):
        out, lse = ft.attention_decode(
            torch.randn(2, 2, 1, 8), cache, sinks=sinks, is_causal=False, return_lse=True
        )
    assert torch.equal(lse, sinks[:, None].expand(2, 2, 1)) and not out.any()


@pytest.mark.parametrize("hidden", [8, 7], ids="{} hidden".format)
@pytest.mark.parametrize("on", backends_of("attention"))
def test_b79_sinks_of_one_part_of_the_keys(on, hidden):
    """ROCm/rocm-libraries PR #12229: the sink counts twice, or not where its part has no key."""
    mask = torch.arange(16) >= hidden
    merging = None if on in backends_of("merge_attention") else "torch"

    def merged(q, k, v, sinks):
        parts = [
            ft.attention(
                q, k[:, :, part], v[:, :, part], mask=mask[part], sinks=s, return_lse=True
            )
            for part, s in ((slice(0, 8), sinks), (slice(8, 16), None))
        ]  # fmt: skip
        outs, lses = zip(*parts)
        return ft.merge_attention(outs, lses, backend=merging)

    def whole(q, k, v, sinks):
        return reference.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)

    shapes = (1, 2, 3, 8), (1, 2, 16, 8), (1, 2, 16, 8), (2,)

    def drawn():
        return [torch.randn(shape) for shape in shapes]

    check(merged, whole, drawn(), on=on, redraw=drawn)
