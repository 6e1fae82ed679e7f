"""ft.nn.MultiheadAttention against torch's, over every flag of constructor and call."""

import copy

import modules
import pytest
import torch
from torch import nn

import contract
import fasttransformer as ft
from fasttransformer.backends import TABLE

L, S, B, E, H = 5, 7, 3, 16, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)

#: flag → values of the grid; see `build` and `arguments`.
GRID = {
    "batch_first": (True, False),
    "bias": (True, False),
    "kv_dims": ("same", "k", "both"),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "kind": ("self", "cross", "three"),
    "batched": (True, False),
    "weights": ("none", "mean", "heads"),
    "attn_mask": ("none", "bool", "float", "bool_3d", "float_3d", "causal", "causal_float"),
    "padding": ("none", "bool", "float"),
    "training": (False, True),
    "grads": (True, False),
}


CASES = modules.sample_grid(GRID, 320, 1)


def test_the_sample_has_every_pair_of_values():
    modules.assert_every_pair(GRID, CASES)


def build(case: dict, dtype=torch.float32) -> nn.MultiheadAttention:
    dims = {"same": {}, "k": {"kdim": 6}, "both": {"kdim": 6, "vdim": 10}}[case["kv_dims"]]
    if case["kind"] == "self":
        dims = {}
    mha = nn.MultiheadAttention(
        E, H, dropout=0.0 if case["training"] else 0.5, bias=case["bias"],
        add_bias_kv=case["add_bias_kv"], add_zero_attn=case["add_zero_attn"],
        batch_first=case["batch_first"], **dims,
    )  # fmt: skip
    for p in mha.parameters():  # biases start at 0
        nn.init.normal_(p, std=0.3)
    return mha.to(dtype)


def arguments(case: dict, mha: nn.MultiheadAttention, dtype=torch.float32):
    """inputs, a call that gives them to a module, and the masks."""

    def sequence(length, features):
        if not case["batched"]:
            shape = (length, features)
        elif case["batch_first"]:
            shape = (B, length, features)
        else:
            shape = (length, B, features)
        return torch.randn(shape).to(dtype)

    kind = case["kind"]
    if kind == "cross" and mha.kdim != mha.vdim:
        kind = "three"
    k_len = L if kind == "self" else S
    batch = B if case["batched"] else 1
    x = sequence(L, E)
    if kind == "self":
        inputs, call = [x], lambda m, x, **kw: m(x, x, x, **kw)
    elif kind == "cross":
        inputs, call = [x, sequence(S, mha.kdim)], lambda m, x, y, **kw: m(x, y, y, **kw)
    else:
        inputs = [x, sequence(S, mha.kdim), sequence(S, mha.vdim)]
        call = lambda m, q, k, v, **kw: m(q, k, v, **kw)  # noqa: E731
    options = {
        "need_weights": case["weights"] != "none",
        "average_attn_weights": case["weights"] == "mean",
    }
    name = case["attn_mask"]
    shape = (batch * H, L, k_len) if name.endswith("3d") else (L, k_len)
    if name.startswith("bool"):
        options["attn_mask"] = torch.rand(shape) < 0.3
        options["attn_mask"][..., 0] = False  # no row without a key: torch gives NaN for those
    elif name.startswith("float"):
        options["attn_mask"] = torch.randn(shape).to(dtype)
    elif name.startswith("causal"):
        mask = torch.ones(L, k_len, dtype=torch.bool).triu(1)
        if name.endswith("float"):
            mask = torch.zeros(L, k_len).masked_fill(mask, float("-inf")).to(dtype)
        options |= {"attn_mask": mask, "is_causal": True}
    if case["padding"] != "none":
        padding = torch.rand(batch, k_len) < 0.3
        padding[:, 0] = False
        if not case["batched"]:
            padding = padding[0]
        if case["padding"] == "float":
            padding = torch.where(padding, float("-inf"), torch.randn(padding.shape)).to(dtype)
        options["key_padding_mask"] = padding
    return inputs, call, options


def check(case: dict, dtype=torch.float32) -> list[float]:
    mha = build(case, dtype)
    inputs, call, options = arguments(case, mha, dtype)
    ours = modules.ours_of(mha)
    try:
        ratios = modules.compare(
            mha, inputs, grads=case["grads"], training=case["training"], ours=ours, call=call,
            **options,
        )  # fmt: skip
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error
    assert ft.nn.fallbacks(ours) == {}
    return ratios


@pytest.mark.parametrize("start", range(0, len(CASES), 40))
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_float32(start):
    ratios = [r for case in CASES[start : start + 40] for r in check(case)]
    modules.assert_no_worse(ratios)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_other_dtypes(dtype):
    ratios = [r for case in CASES[:40] for r in check(case, dtype)]
    if dtype != torch.float64:
        modules.assert_no_worse(ratios)


@pytest.mark.parametrize("on", contract.backends_of("attention"))
@pytest.mark.parametrize("batch_first", [True, False])
def test_on_every_backend(on, batch_first):
    case = dict.fromkeys(GRID) | {
        "batch_first": batch_first, "bias": True, "kv_dims": "same", "add_bias_kv": False,
        "add_zero_attn": False, "kind": "self", "batched": True, "weights": "none",
        "attn_mask": "bool", "padding": "float", "training": True,
    }  # fmt: skip
    mha = build(case)
    inputs, call, options = arguments(case, mha)
    modules.skip_unless_runs(on, "attention", "linear_add")
    if TABLE["attention"][on.split(":")[0]].unsupported(
        torch.float32, frozenset({"grad", "mask", "bias"}), ()
    ):
        pytest.skip("the kernel has no backward yet")
    with contract.running_on(on):
        modules.compare(mha, inputs, training=True, call=call, **options)


def test_a_module_of_real_size_keeps_the_strict_contract():
    mha = nn.MultiheadAttention(256, 4, batch_first=True)
    x = torch.randn(2, 96, 256)
    padding = torch.arange(96) >= torch.tensor([96, 50])[:, None]
    for need_weights in (False, True):
        modules.compare(
            mha, [x], call=lambda m, x, **kw: m(x, x, x, **kw), key_padding_mask=padding,
            need_weights=need_weights,
        )  # fmt: skip


@pytest.mark.parametrize(
    "mask_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("need_weights", [False, True])
def test_float_masks_of_every_dtype(mask_dtype, dtype, need_weights):
    mha = nn.MultiheadAttention(E, H, batch_first=True).to(dtype)
    x = torch.randn(B, L, E, dtype=dtype)
    mask = torch.randint(-3, 3, (L, L)).to(mask_dtype)  # exact in every dtype
    mask[0, 3] = float("-inf")
    padding = torch.zeros(B, L, dtype=mask_dtype)
    padding[1, 4] = float("-inf")
    modules.compare(
        mha, [x], call=lambda m, x, **kw: m(x, x, x, **kw), attn_mask=mask,
        key_padding_mask=padding, need_weights=need_weights,
    )  # fmt: skip


def test_float_mask_may_require_a_gradient():
    mha = nn.MultiheadAttention(E, H, batch_first=True).double()
    x = torch.randn(B, L, E, dtype=torch.float64)
    grads = []
    for module in (mha, modules.ours_of(mha)):
        for need_weights in (False, True):
            mask = torch.linspace(-1, 1, L * L, dtype=torch.float64).view(L, L).requires_grad_()
            module(x, x, x, attn_mask=mask, need_weights=need_weights)[0].square().sum().backward()
            grads.append(mask.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


# ---- rows without a key ----


def textbook(mha, x, allowed, bias=None):
    """Self-attention, batch first: (B, H, L, S) weights with empty rows 0, and the output."""
    batch, length, embed = x.shape
    q, k, v = (x @ mha.in_proj_weight.T + mha.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(batch, length, mha.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    empty = ~allowed.expand_as(scores).any(-1, keepdim=True)
    weights = torch.where(empty, 0.0, torch.where(empty, 0.0, scores).softmax(-1))
    out = (weights @ v).transpose(1, 2).reshape(batch, length, embed)
    return out @ mha.out_proj.weight.T + mha.out_proj.bias, weights


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_b06_one_head_fully_masked(training, as_float):
    # pytorch/pytorch#160064
    mha = nn.MultiheadAttention(3, 3, batch_first=True)
    nn.init.normal_(mha.in_proj_bias)
    nn.init.normal_(mha.out_proj.bias)
    ours = modules.ours_of(mha).train(training)
    x = torch.randn(1, 5, 3)
    mask = torch.zeros(3, 1, 1, dtype=torch.bool)
    mask[2] = True
    mask = mask.expand(3, 5, 5)
    given = torch.zeros(3, 5, 5).masked_fill(mask, float("-inf")) if as_float else mask
    out, weights = ours(x, x, x, attn_mask=given, average_attn_weights=False)
    plain, none = ours(x, x, x, attn_mask=given, need_weights=False)
    want, want_weights = textbook(copy.deepcopy(mha).double(), x.double(), ~mask[None])
    assert none is None
    assert not weights[0, 2].any()
    torch.testing.assert_close(weights, want_weights.float())
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(plain, want.float())
    for result in (out, plain):
        ours.zero_grad()
        result.sum().backward(retain_graph=True)
        assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_b07_a_sample_of_length_zero(need_weights, as_float):
    # pytorch/pytorch#27968
    mha = nn.MultiheadAttention(20, 5, dropout=0.1)
    nn.init.normal_(mha.out_proj.bias)
    ours = modules.ours_of(mha).train()
    x = torch.randn(5, 4, 20, requires_grad=True)
    lengths = torch.tensor([5, 3, 1, 0])
    padding = torch.arange(5) >= lengths[:, None]
    given = torch.zeros(4, 5).masked_fill(padding, float("-inf")) if as_float else padding
    for training in (True, False):
        ours.train(training)
        out, weights = ours(x, x, x, key_padding_mask=given, need_weights=need_weights)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, 3], mha.out_proj.bias.expand(5, 20))
        if need_weights:
            assert not weights[3].any()
            assert not weights[padding[:, None].expand(4, 5, 5)].any()
            if not training:
                torch.testing.assert_close(weights[:3].sum(-1), torch.ones(3, 5))
        x.grad = None
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        assert not x.grad[:, 3].any()
        assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_b07_weights_are_those_after_dropout():
    mha = ft.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True).train()
    x = torch.randn(4, 32, 16)
    _, weights = mha(x, x, x, average_attn_weights=False)
    _, kept = mha.eval()(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(weights[~dropped], 2 * kept[~dropped])


# ---- dropout, causal rule ----


@pytest.mark.parametrize("need_weights", [False, True])
def test_b29_no_dropout_in_eval(need_weights):
    # pytorch/pytorch#124464
    mha = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    ours = modules.ours_of(mha).eval()
    x = torch.randn(B, L, E)
    first = ours(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(first, ours(x, x, x, need_weights=need_weights)[0])
    ours.dropout = 0.0
    assert torch.equal(first, ours(x, x, x, need_weights=need_weights)[0])


def test_dropout_in_training_drops_and_keeps_the_mean():
    mha = ft.nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True).train()
    x = torch.randn(1, 16, 16).expand(400, -1, -1)
    with torch.no_grad():
        kept = mha.eval()(x, x, x, need_weights=False)[0]
        draws = mha.train()(x, x, x, need_weights=False)[0]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), kept[0], atol=0.06, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_b31_causal_is_never_dropped(padded, need_weights, dropout, hint, as_float):
    # keras-team/keras#23038
    mha = ft.nn.MultiheadAttention(E, H, dropout=dropout, batch_first=True).train()
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if as_float:
        mask = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(2, 6, dtype=torch.bool) if padded else None
    x = torch.randn(2, 6, E)
    y = x.clone()
    y[:, 5] += 1.0
    outs = []
    for value in (x, y):
        torch.manual_seed(3)
        outs.append(
            mha(
                value, value, value, attn_mask=mask, is_causal=hint, need_weights=need_weights,
                key_padding_mask=padding,
            )[0]
        )  # fmt: skip
    assert torch.equal(outs[0][:, :5], outs[1][:, :5])
    assert not torch.equal(outs[0][:, 5], outs[1][:, 5])


def test_is_causal_is_a_hint_and_needs_the_mask():
    mha = ft.nn.MultiheadAttention(E, H)
    x = torch.randn(L, B, E)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        mha(x, x, x, is_causal=True)


# ---- shapes and bad input ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads, embed, bias", [(8, 128, False), (3, 9, True), (1, 7, True)])
def test_b36_no_bias_and_odd_heads(training, heads, embed, bias):
    # pytorch/pytorch#97128
    mha = nn.MultiheadAttention(embed, heads, bias=bias, batch_first=True)
    ours = ft.nn.MultiheadAttention(embed, heads, bias=bias, batch_first=True)
    assert ours.state_dict().keys() == mha.state_dict().keys()
    assert any("bias" in key for key in ours.state_dict()) == bias
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    modules.compare(
        mha, [torch.randn(2, 5, embed)], grads=training, training=training,
        call=lambda m, x, **kw: m(x, x, x, **kw), key_padding_mask=padding,
    )  # fmt: skip


def test_b37_mask_per_batch_and_head():
    # pytorch/pytorch#97409
    mha = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(3, 10, 32)
    mask = torch.rand(12, 10, 10) < 0.4
    mask[..., 0] = False
    ours = modules.ours_of(mha)
    outs = [
        ours.train(mode)(x, x, x, attn_mask=mask, need_weights=False)[0] for mode in (True, False)
    ]
    assert torch.equal(*outs)
    want, _ = textbook(copy.deepcopy(mha).double(), x.double(), ~mask.view(3, 4, 10, 10))
    torch.testing.assert_close(outs[0], want.float())


def test_b41_wrong_shapes_are_named():
    # pytorch/pytorch#99945
    mha = ft.nn.MultiheadAttention(256, 4)
    x = torch.randn(20, 6, 256)
    with pytest.raises(ValueError, match=r"\(20, 6\).*\(6, 20\)"):
        mha(x, x, x, key_padding_mask=torch.zeros(20, 6, dtype=torch.bool))
    mha = ft.nn.MultiheadAttention(640, 4, batch_first=True)
    query, key = torch.randn(1, 1, 640), torch.randn(4, 196, 640)
    with pytest.raises(ValueError, match=r"\(1, 1, 640\).*\(4, 196, 640\)"):
        mha(query, key, key)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"attn_mask": torch.zeros(L, L + 1)}, ValueError, r"attn_mask has shape \(5, 6\)"),
        ({"attn_mask": torch.zeros(B, L, L)}, ValueError, r"\(12, 5, 5\)"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"key_padding_mask": torch.zeros(B, L, dtype=torch.long)}, TypeError, "int64"),
        ({"key_padding_mask": torch.zeros(L, B)}, ValueError, r"\(3, 5\)"),
        ({"query": torch.zeros(B, L, E + 1)}, ValueError, "17"),
        ({"query": torch.zeros(L, E)}, ValueError, "dimensions"),
        ({"query": torch.zeros(1, B, L, E)}, ValueError, "dimensions"),
        ({"value": torch.zeros(B, L + 1, E)}, ValueError, "length"),
    ],
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_bad_input(change, error, match, need_weights):
    mha = ft.nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, L, E)
    arguments = {"query": x, "key": x, "value": x, "need_weights": need_weights} | change
    with pytest.raises(error, match=match):
        mha(**arguments)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty_batch_and_empty_lengths(batch_first, need_weights):
    mha = ft.nn.MultiheadAttention(E, H, batch_first=batch_first)
    for batch, q_len in ((0, 3), (2, 0)):
        shape = (batch, q_len) if batch_first else (q_len, batch)
        x = torch.randn(*shape, E)
        out, _ = mha(x, x, x, need_weights=need_weights)
        assert out.shape == x.shape
        out.sum().backward()
    query = torch.randn(2, 3, E) if batch_first else torch.randn(3, 2, E)
    memory = torch.randn(2, 0, E) if batch_first else torch.randn(0, 2, E)
    out, _ = mha(query, memory, memory, need_weights=need_weights)
    torch.testing.assert_close(out, mha.out_proj.bias.expand_as(out))


def test_output_is_contiguous_and_strided_input_is_read_right():
    for batch_first in (True, False):
        mha = nn.MultiheadAttention(E, H, batch_first=batch_first)
        ours = modules.ours_of(mha)
        x = torch.randn(B, L, E).transpose(0, 1)
        assert ours(x, x, x)[0].is_contiguous()
        x = torch.randn(E, L, B).permute(2, 1, 0)
        torch.testing.assert_close(ours(x, x, x)[0], mha(x, x, x)[0])


def test_one_projection_for_self_attention_two_for_cross(monkeypatch):
    calls = []
    import fasttransformer.nn.attention as where

    real = where.linear_add
    monkeypatch.setattr(where, "linear_add", lambda *a, **k: calls.append(1) or real(*a, **k))
    mha = ft.nn.MultiheadAttention(E, H)
    x, y = torch.randn(L, B, E), torch.randn(S, B, E)
    for arguments, count in (((x, x, x), 2), ((x, y, y), 3), ((x, y, y.clone()), 4)):
        calls.clear()
        mha(*arguments)
        assert len(calls) == count  # the last one is the output projection


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_b14_packed_projection_at_large_heads(head_dim):
    # Dao-AILab/flash-attention#2541
    mha = nn.MultiheadAttention(2 * head_dim, 2, batch_first=True)
    modules.compare(
        mha, [torch.randn(1, 128, 2 * head_dim)], training=True,
        call=lambda m, x: m(x, x, x, need_weights=False),
    )  # fmt: skip
