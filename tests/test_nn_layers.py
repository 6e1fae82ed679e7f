"""ft.nn's Transformer layers and stacks against torch's, over every flag."""

import copy
import functools
import io
import itertools
import pickle
import random
import warnings

import modules
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft

L, S, B, E, H, FF = 5, 7, 3, 16, 4, 24

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.silu": F.silu,
    "GELU(tanh)": nn.GELU(approximate="tanh"),
    "partial": functools.partial(F.leaky_relu, negative_slope=0.2),
    "Mish": nn.Mish(),
    "PReLU": nn.PReLU(),
}
GRID = {
    "activation": tuple(ACTIVATIONS),
    "batch_first": (True, False),
    "norm_first": (False, True),
    "bias": (True, False),
    "batched": (True, False),
    "mask": ("none", "bool", "float", "bool_3d", "float_3d", "causal"),
    "padding": ("none", "bool", "float"),
    "memory_mask": ("none", "bool", "float", "float_3d"),
    "memory_padding": ("none", "bool", "float"),
    "training": (False, True),
    "grads": (True, False),
}


def sample_grid(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [{flag: rng.choice(values) for flag, values in GRID.items()} for _ in range(count)]


CASES = sample_grid(240, 2)


def test_the_sample_has_every_pair_of_values():
    seen = set()
    for case in CASES:
        seen |= set(itertools.combinations(case.items(), 2))
    for (f, fs), (g, gs) in itertools.combinations(GRID.items(), 2):
        for pair in itertools.product(fs, gs):
            assert ((f, pair[0]), (g, pair[1])) in seen


def build(case: dict, kind: type, dtype=torch.float32) -> nn.Module:
    layer = kind(
        E, H, FF, dropout=0.0 if case["training"] else 0.5, bias=case["bias"],
        activation=ACTIVATIONS[case["activation"]], layer_norm_eps=1e-3,
        batch_first=case["batch_first"], norm_first=case["norm_first"],
    )  # fmt: skip
    for p in layer.parameters():  # biases and norms start at 0 and 1
        nn.init.normal_(p, std=0.4)
    return layer.to(dtype)


def sequence(case: dict, length: int, dtype) -> torch.Tensor:
    shape = (B, length, E) if case["batch_first"] else (length, B, E)
    return torch.randn((length, E) if not case["batched"] else shape).to(dtype)


def mask_of(kind: str, case: dict, q_len: int, k_len: int, dtype) -> torch.Tensor | None:
    batch = B if case["batched"] else 1
    shape = (batch * H, q_len, k_len) if kind.endswith("3d") else (q_len, k_len)
    if kind.startswith("bool"):
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False
        return mask
    if kind.startswith("float"):
        return torch.randn(shape).to(dtype)
    if kind == "causal":
        return nn.Transformer.generate_square_subsequent_mask(q_len, dtype=dtype)
    return None


def padding_of(kind: str, case: dict, length: int, dtype) -> torch.Tensor | None:
    if kind == "none":
        return None
    padding = torch.rand(B if case["batched"] else 1, length) < 0.3
    padding[:, 0] = False
    if kind == "float":
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf")).to(dtype)
    return padding if case["batched"] else padding[0]


def check(case: dict, kind: type, dtype=torch.float32, collect=None) -> None:
    layer = build(case, kind, dtype)
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
        modules.compare(
            layer, inputs, grads=case["grads"], training=case["training"], ours=ours, steps=8,
            collect=collect, **options,
        )  # fmt: skip
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error
    assert ft.nn.fallbacks(ours) == {}


KINDS = [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", range(0, len(CASES), 60))
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_float32(kind, start):
    errors: list = []
    for case in CASES[start : start + 60]:
        check(case, kind, collect=errors)
    modules.assert_distribution(errors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_against_torch_other_dtypes(kind, dtype):
    errors = None if dtype == torch.float64 else []
    for case in CASES[:20]:
        if errors is not None and case["activation"] not in ("gelu", "F.silu", "Mish"):
            # a rounding step near a kink flips the derivative, in torch's 16-bit run too
            case = case | {"activation": "GELU(tanh)"}
        if dtype != torch.float64 and case["activation"] not in ("gelu", "F.silu", "Mish"):
            # a rounding step near a kink flips the derivative, in torch's 16-bit run too
            case = case | {"activation": "GELU(tanh)"}
        check(case, kind, dtype, errors)
    if errors is not None:
        modules.assert_distribution(errors)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_of_real_size_keeps_the_strict_contract(norm_first, training):
    layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True, norm_first=norm_first)
    modules.compare(layer, [torch.randn(2, 64, 128)], training=training, steps=1)


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
        modules.compare(layer, [torch.randn(B, L, E)], ours=ours, steps=8)
        assert ft.nn.fallbacks(ours) == {}


# ---- what is not plain is called ----


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


PARTS = {
    nn.TransformerEncoderLayer: (
        "self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2",
    ),
    nn.TransformerDecoderLayer: (
        "self_attn", "multihead_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "norm3",
        "dropout1", "dropout2", "dropout3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_hooks_on_parts_fire(kind, norm_first):
    for name in PARTS[kind]:
        layer = kind(E, H, FF, 0.0, norm_first=norm_first)
        ours = modules.ours_of(layer)
        inputs = [torch.randn(L, B, E)] * (1 + (kind is KINDS[1]))

        def change(module, args, out):
            return (out[0] + 0.1, out[1]) if isinstance(out, tuple) else out + 0.1

        for module in (layer, ours):
            getattr(module, name).register_forward_hook(change)
        torch.testing.assert_close(ours(*inputs), layer(*inputs))
        (reasons,) = ft.nn.fallbacks(ours).values()
        assert list(reasons) == [f"{name} has a hook: submodules are called one by one"]


def test_global_hooks_and_backward_hooks_fire():
    ours = ft.nn.TransformerEncoderLayer(E, H, FF, 0.0)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    try:
        ours(torch.randn(L, B, E))
    finally:
        handle.remove()
    assert {"Linear", "LayerNorm", "Dropout", "MultiheadAttention"} <= set(seen)
    seen.clear()
    ours.norm1.register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    ours(torch.randn(L, B, E)).sum().backward()
    assert seen == ["backward"]


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_parts_run(kind):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            out = self.inner(*args, **kwargs)
            return (out[0] * 1.5, out[1]) if isinstance(out, tuple) else out * 1.5

    for name in PARTS[kind]:
        layer = kind(E, H, FF, 0.0)
        setattr(layer, name, Wrapped(getattr(layer, name)))
        ours = modules.ours_of(layer)
        inputs = [torch.randn(L, B, E)] * (1 + (kind is KINDS[1]))
        torch.testing.assert_close(ours(*inputs), layer(*inputs))
        assert "Wrapped" in str(ft.nn.fallbacks(ours))


def test_replaced_block_methods_and_forwards_run():
    class Mine(ft.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * 0.0

    layer = Mine(E, H, FF, 0.0, norm_first=True)
    x = torch.randn(L, B, E)
    torch.testing.assert_close(layer(x), x + layer._sa_block(layer.norm1(x), None, None))
    layer = ft.nn.TransformerEncoderLayer(E, H, FF, 0.0, norm_first=True)
    layer._ff_block = lambda x: 0.0
    torch.testing.assert_close(layer(x), x + layer._sa_block(layer.norm1(x), None, None))
    layer = ft.nn.TransformerEncoderLayer(E, H, FF, 0.0, norm_first=True)
    layer.linear2.forward = torch.zeros_like
    layer.linear2.forward = lambda h: h.new_zeros(L, B, E)
    torch.testing.assert_close(layer(x), x + layer._sa_block(layer.norm1(x), None, None))


def test_parametrized_parts_are_felt():
    for old_style in (False, True):
        layer = nn.TransformerEncoderLayer(E, H, FF, 0.0)
        ours = modules.ours_of(layer)
        for module in (layer, ours):
            if old_style:  # a forward hook that writes the weight
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    nn.utils.weight_norm(module.linear1)
                with torch.no_grad():
                    module.linear1.weight_g.mul_(3.0)
            else:
                for part in (module.linear1, module.norm1, module.self_attn.out_proj):
                    nn.utils.parametrize.register_parametrization(part, "weight", Doubled())
                nn.utils.parametrizations.weight_norm(module.linear2)
        x = torch.randn(L, B, E)
        torch.testing.assert_close(ours(x), layer(x))


# ---- stacks ----


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
def test_encoder_stack(norm, norm_first, batch_first, mask, padding):
    case = {
        "activation": "gelu", "batch_first": batch_first, "norm_first": norm_first, "bias": True,
        "batched": True, "training": False,
    }  # fmt: skip
    layer = build(case, nn.TransformerEncoderLayer)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E) if norm else None)
    padding = padding_of(padding, case, L, torch.float32)
    options = {
        "mask": mask_of(mask, case, L, L, torch.float32), "src_key_padding_mask": padding
    }  # fmt: skip
    for grads in (True, False):  # without gradients torch takes its nested-tensor path
        inputs = [sequence(case, L, torch.float32)]
        modules.compare(stack, inputs, grads=grads, steps=12, **options)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("causal", [None, True])
def test_transformer(causal):
    model = nn.Transformer(E, H, 2, 2, FF, dropout=0.0, batch_first=True)
    inputs = [torch.randn(B, S, E), torch.randn(B, L, E)]
    src_padding = torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]
    tgt_padding = torch.arange(L) >= torch.tensor([2, L, 4])[:, None]
    modules.compare(
        model, inputs, steps=12,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(L), tgt_is_causal=causal,
        src_key_padding_mask=src_padding, tgt_key_padding_mask=tgt_padding,
        memory_key_padding_mask=src_padding,
    )  # fmt: skip


def test_b66_layers_of_a_stack_start_equal():
    # Modalities/modalities#357
    stack = ft.nn.TransformerEncoder(ft.nn.TransformerEncoderLayer(E, H, FF), 3)
    first, *others = [layer.state_dict() for layer in stack.layers]
    for other in others:
        assert all(torch.equal(first[k], other[k]) for k in first)
    parameters = list(stack.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    assert all(type(layer) is ft.nn.TransformerEncoderLayer for layer in stack.layers)


def test_stack_over_layers_that_are_not_ours():
    class Seen(nn.Module):
        def forward(self, src, src_mask=None, is_causal=False, src_key_padding_mask=None):
            assert src_mask.is_floating_point()
            assert src_key_padding_mask.is_floating_point()
            return src + src_mask[0, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = ft.nn.TransformerEncoder(Seen(), 2)
    mask, padding = torch.zeros(L, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
    x = torch.randn(B, L, E)
    assert torch.equal(stack(x, mask, padding, is_causal=False), x)


def test_nested_input_falls_back_with_a_reason():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True).eval()
    ours = modules.ours_of(layer)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        torch.testing.assert_close(ours(x).to_padded_tensor(0.0), layer(x).to_padded_tensor(0.0))
    assert "nested tensors" in ft.nn.fallbacks(ours)[""]


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
