"""ft.nn's TransformerEncoder, TransformerDecoder and Transformer against torch's."""

import warnings

import modules
import pytest
import torch
from layer_cases import FF, B, E, H, L, S, build, mask_of, padding_of, sequence
from torch import nn

import fasttransformer as ft

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
        modules.compare(stack, inputs, grads=grads, **options)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("causal", [None, True])
def test_transformer(causal):
    model = nn.Transformer(E, H, 2, 2, FF, dropout=0.0, batch_first=True)
    inputs = [torch.randn(B, S, E), torch.randn(B, L, E)]
    src_padding = torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]
    tgt_padding = torch.arange(L) >= torch.tensor([2, L, 4])[:, None]
    modules.compare(
        model, inputs,
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
    assert "src is a nested tensor" in ft.nn.fallbacks(ours)[""]
