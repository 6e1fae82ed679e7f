"""ft.nn's Transformer layers and stacks against torch's, over every flag."""

import copy
import io
import pickle
import sys
import warnings

import modules
import pytest
import torch
from layer_cases import (
    FF,
    GRID,
    KINDS,
    SMOOTH,
    B,
    E,
    H,
    L,
    S,
    build,
    keep_from_kink,
    mask_of,
    padding_of,
    sequence,
)
from torch import nn

import fasttransformer as ft

CASES = modules.sample_grid(GRID, 240, 2)


def test_the_sample_has_every_pair_of_values():
    modules.assert_every_pair(GRID, CASES)


def check(case: dict, kind: type, dtype=torch.float32) -> list[float]:
    layer = build(case, kind, dtype)
    if dtype in (torch.bfloat16, torch.float16) and case["activation"] not in SMOOTH:
        keep_from_kink(layer)
    inputs = [sequence(case, L, dtype)]
    mask = mask_of(case["mask"], case, L, L, dtype)
    padding = padding_of(case["padding"], case, L, dtype)
    causal = case["mask"] == "causal"
    if kind is nn.TransformerEncoderLayer:
        options = {"src_mask": mask, "src_key_padding_mask": padding, "is_causal": causal}
    else:
        inputs.append(sequence(case, S, dtype))
        options = {
            "tgt_mask": mask, "tgt_key_padding_mask": padding, "tgt_is_causal": causal,
            "memory_mask": mask_of(case["memory_mask"], case, L, S, dtype),
            "memory_key_padding_mask": padding_of(case["memory_padding"], case, S, dtype),
        }  # fmt: skip
    ours = modules.ours_of(layer)
    try:
        ratios = modules.compare(
            layer, inputs, grads=case["grads"], training=case["training"], ours=ours, **options
        )  # fmt: skip
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error
    assert ft.nn.fallbacks(ours) == {}
    return ratios


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", range(0, len(CASES), 60))
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_float32(kind, start):
    ratios = [r for case in CASES[start : start + 60] for r in check(case, kind)]
    modules.assert_no_worse(ratios)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_other_dtypes(kind, dtype):
    ratios = [r for case in CASES[:20] for r in check(case, kind, dtype)]
    if dtype != torch.float64:
        modules.assert_no_worse(ratios)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("wrong", ["hidden", "project_norm"])
def test_drawing_again_hides_no_wrong_number(monkeypatch, wrong, seed):
    """A few hundred rounding steps in one part of a tiny layer are never taken for luck."""
    torch.manual_seed(seed)
    where = sys.modules["fasttransformer.nn.layers"]
    right = getattr(where, wrong)

    def off(*args):
        return right(*args) * 1.00005

    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    x = torch.randn(B, L, E)
    modules.compare(layer, [x])
    monkeypatch.setattr(where, wrong, off)
    for grads in (False, True):
        with pytest.raises(AssertionError, match="error"):
            modules.compare(layer, [x], grads=grads)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_of_real_size_keeps_the_strict_contract(norm_first, training):
    layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True, norm_first=norm_first)
    modules.compare(layer, [torch.randn(2, 64, 128)], training=training)


# ---- masks ----


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("through_stack", [False, True])
def test_b34_float_masks_are_the_same_in_eval(padded, through_stack):
    # pytorch/pytorch#118628
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2) if through_stack else layer
    ours = modules.ours_of(module)
    x, mask = torch.randn(3, 5, 8), torch.randn(5, 5)
    padding = None
    if padded:
        padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outs = [ours.train(mode)(x, mask, padding) for mode in (True, False)]
        want = module.train()(x, mask, padding)
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_fully_padded_samples_are_finite(kind, norm_first):
    layer = ft.nn.TransformerEncoderLayer if kind is KINDS[0] else ft.nn.TransformerDecoderLayer
    layer = layer(E, H, FF, batch_first=True, norm_first=norm_first)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    for mode in (True, False):
        layer.train(mode)
        x = torch.randn(B, L, E, requires_grad=True)
        if kind is KINDS[0]:
            out = layer(x, src_key_padding_mask=padding)
        else:
            out = layer(x, x, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)
        out.square().sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_b31_causal_in_decoder_layers(training, norm_first, dropout):
    # keras-team/keras#23038
    layer = ft.nn.TransformerDecoderLayer(
        E, H, FF, dropout, batch_first=True, norm_first=norm_first
    ).train(training)
    memory = torch.randn(2, S, E)
    x = torch.randn(2, 6, E)
    y = x.clone()
    y[:, 5] += 1.0
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    for options in (
        {"tgt_mask": mask},
        {"tgt_mask": mask, "tgt_is_causal": True},
        {"tgt_mask": mask.bool(), "tgt_is_causal": True, "tgt_key_padding_mask": padding},
    ):
        outs = []
        for value in (x, y):
            torch.manual_seed(5)
            outs.append(layer(value, memory, **options))
        assert torch.equal(outs[0][:, :5], outs[1][:, :5])
        assert not torch.equal(outs[0][:, 5], outs[1][:, 5])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_b32_attention_to_the_memory_is_not_causal(grad, causal):
    # huggingface/transformers#48172
    layer = ft.nn.TransformerDecoderLayer(E, H, FF, batch_first=True).eval()
    x, memory = torch.randn(2, 3, E), torch.randn(2, 7, E)
    other = memory.clone()
    other[:, 6] += 1.0
    mask = nn.Transformer.generate_square_subsequent_mask(3) if causal else None
    with torch.set_grad_enabled(grad):
        a, b = (layer(x, m, tgt_mask=mask, tgt_is_causal=causal) for m in (memory, other))
    assert ((a - b).abs().amax(-1) > 1e-6).all()


def test_b67_memory_padding_is_kept():
    # huggingface/transformers PR #47946
    layer = ft.nn.TransformerDecoderLayer(E, H, FF, batch_first=True).eval()
    x, memory = torch.randn(2, 9, E), torch.randn(2, 4, E)
    padding = torch.tensor([[False, False, True, True], [False] * 4])
    other = memory.clone()
    other[0, 2:] = 100 * torch.randn(2, E)
    a, b = (layer(x, m, memory_key_padding_mask=padding) for m in (memory, other))
    assert torch.equal(a, b)
    assert a.abs().sum(-1).gt(0).all()


# ---- dropout ----


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_b29_no_dropout_in_eval(kind, norm_first):
    # pytorch/pytorch#124464
    case = dict.fromkeys(GRID, "none") | {
        "activation": "gelu", "batch_first": True, "norm_first": norm_first, "bias": True,
        "batched": True, "training": False, "grads": True,
    }  # fmt: skip
    layer = build(case, kind)
    ours, inputs = modules.ours_of(layer).eval(), [sequence(case, L, torch.float32)] * 2
    inputs = inputs[: 1 + (kind is KINDS[1])]
    first = ours(*inputs)
    assert torch.equal(first, ours(*inputs))
    assert torch.equal(first, modules.without_dropout(ours)(*inputs))
    ours.train()
    assert not torch.equal(ours(*inputs), ours(*inputs))


@pytest.mark.parametrize("which", ["dropout", "dropout1", "dropout2", "attention"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_dropout_acts_where_torchs_does(which, norm_first):
    """Mean and spread over many draws are torch's, for one dropout at a time."""
    layer = nn.TransformerEncoderLayer(
        E, H, FF, 0.0, activation=nn.Identity(), batch_first=True, norm_first=norm_first
    )
    if which == "attention":
        layer.self_attn.dropout = 0.25
    else:
        getattr(layer, which).p = 0.25
    ours = modules.ours_of(layer).train()
    x = torch.randn(1, L, E).expand(3000, -1, -1)
    with torch.no_grad():
        got, want = ours(x), layer.train()(x)
    assert ft.nn.fallbacks(ours) == {}
    torch.testing.assert_close(got.mean(0), want.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(got.std(0), want.std(0), atol=0.06, rtol=0)


def test_gradient_with_dropout_is_that_of_the_mask_drawn():
    layer = ft.nn.TransformerEncoderLayer(E, H, FF, 0.4, batch_first=True).double().train()
    x = torch.randn(1, L, E, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(11)
        return layer(x)

    assert torch.autograd.gradcheck(call, (x,))


# ---- flags, activations, bias ----


@pytest.mark.parametrize("mode", [True, False])
def test_b36_no_bias_and_odd_heads(mode):
    # pytorch/pytorch#97128
    model = ft.nn.Transformer(9, 3, 1, 1, 12, bias=False, batch_first=True, dropout=0.0)
    assert not any(key.endswith("bias") for key in model.state_dict())
    model.train(mode)
    padding = torch.tensor([[False, False, True]])
    out = model(torch.randn(1, 3, 9), torch.randn(1, 4, 9), src_key_padding_mask=padding)
    assert out.isfinite().all()


def test_b39_an_activation_module_survives_copies():
    # pytorch/pytorch PR #81832
    for kind in (ft.nn.TransformerEncoderLayer, ft.nn.TransformerDecoderLayer):
        layer = kind(8, 2, 16, activation=nn.SiLU(), batch_first=True).eval()
        inputs = [torch.randn(2, 3, 8)] * (1 + (kind is ft.nn.TransformerDecoderLayer))
        want = layer(*inputs)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for copied in (
            pickle.loads(pickle.dumps(layer)),
            copy.deepcopy(layer),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(copied(*inputs), want)


def test_class_change_of_a_torch_layer_alone():
    """Submodules may stay torch's own: the layer reads their parameters."""
    for kind, ours, count in (
        (nn.TransformerEncoderLayer, ft.nn.TransformerEncoderLayer, 1),
        (nn.TransformerDecoderLayer, ft.nn.TransformerDecoderLayer, 2),
    ):
        layer = kind(E, H, FF, 0.0)
        inputs = [torch.randn(L, B, E)] * count
        want = layer(*inputs)
        layer.__class__ = ours
        torch.testing.assert_close(layer(*inputs), want)
        assert ft.nn.fallbacks(layer) == {}
        layer.__class__ = kind
        assert torch.equal(layer(*inputs), want)


def test_state_dict_round_trips_and_same_initial_parameters():
    for name, arguments in (
        ("TransformerEncoderLayer", (E, H, FF)),
        ("TransformerDecoderLayer", (E, H, FF)),
        ("Transformer", (E, H, 2, 2, FF)),
    ):
        torch.manual_seed(4)
        ours = getattr(ft.nn, name)(*arguments)
        torch.manual_seed(4)
        torchs = getattr(nn, name)(*arguments)
        assert isinstance(ours, getattr(nn, name))
        a, b = ours.state_dict(), torchs.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
        ours.load_state_dict(b)
        torchs.load_state_dict(a)


def test_rms_norms_in_the_place_of_layer_norms_are_fused():
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, norm_first=norm_first)
        layer.norm1, layer.norm2 = nn.RMSNorm(E), nn.RMSNorm(E, eps=1e-3)
        ours = modules.ours_of(layer)
        modules.compare(layer, [torch.randn(B, L, E)], ours=ours)
        assert ft.nn.fallbacks(ours) == {}


# ---- autocast, transformations ----


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_b42_encoder_under_autocast(padded, norm_first):
    # pytorch/pytorch#99012
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2)
    ours = modules.ours_of(stack)
    x = torch.randn(2, 16, 64)
    padding = None
    if padded:
        padding = torch.arange(16) >= torch.tensor([16, 9])[:, None]
    outs = []
    for mode, grad in ((True, True), (False, True), (False, False)):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            outs.append(ours.train(mode)(x, src_key_padding_mask=padding))
    with torch.autocast("cpu", torch.bfloat16):
        torchs = stack.train()(x, src_key_padding_mask=padding)
    want = stack.train()(x, src_key_padding_mask=padding)
    for out in outs:
        assert out.dtype == torchs.dtype == torch.float32
        assert (out - want).abs().max() <= 2 * (torchs - want).abs().max() + 1e-3
    outs[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_compile_fullgraph_forward_and_backward(kind, norm_first):
    layer = modules.ours_of(kind(E, H, FF, 0.0, batch_first=True, norm_first=norm_first))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(B, L, E, requires_grad=True)] * (1 + (kind is KINDS[1]))
    padding = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]
    name = "src_key_padding_mask" if kind is KINDS[0] else "tgt_key_padding_mask"
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        inputs[0].grad = None
        out = module(*inputs, **{name: padding})
        out.square().sum().backward()
        results.append([out, inputs[0].grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results)


def test_compile_fullgraph_of_a_stack_with_a_mask():
    stack = ft.nn.TransformerEncoder(ft.nn.TransformerEncoderLayer(E, H, FF, 0.0), 2).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    x = torch.randn(L, B, E)
    with torch.no_grad():
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")(x, mask)
        torch.testing.assert_close(compiled, stack(x, mask))


def test_export_of_a_layer():
    layer = ft.nn.TransformerEncoderLayer(E, H, FF, batch_first=True).eval()
    x = torch.randn(B, L, E)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_half_to_and_empty():
    layer = ft.nn.TransformerEncoderLayer(E, H, FF, batch_first=True).eval()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert layer.to(dtype)(torch.randn(B, L, E, dtype=dtype)).dtype == dtype
    layer.float()
    for shape in ((0, L, E), (B, 0, E)):
        assert layer(torch.randn(shape)).shape == shape
