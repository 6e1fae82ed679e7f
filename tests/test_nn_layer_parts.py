"""Parts of a Transformer layer that are more than plain: they are called, and nothing is fused."""

import warnings

import modules
import pytest
import torch
from layer_cases import FF, KINDS, B, E, H, L
from torch import nn

import fasttransformer as ft

# ---- what is not plain is called ----


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
                    nn.utils.parametrize.register_parametrization(part, "weight", modules.Doubled())
                nn.utils.parametrizations.weight_norm(module.linear2)
        x = torch.randn(L, B, E)
        torch.testing.assert_close(ours(x), layer(x))
