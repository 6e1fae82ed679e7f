"""ft.nn.MultiheadAttention as a module: autocast, falling back, copies, hooks, compile, export."""

import copy
import io
import pickle
import warnings

import modules
import pytest
import torch
from torch import nn

import fasttransformer as ft

L, S, B, E, H = 5, 7, 3, 16, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


# ---- autocast ----


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masks", ["attn", "padding", "both"])
def test_b42_float_masks_under_autocast(need_weights, training, masks):
    # pytorch/pytorch#99012
    mha = nn.MultiheadAttention(256, 8).train(training)
    ours = modules.ours_of(mha)
    x = torch.randn(64, 2, 256)
    options = {"need_weights": need_weights}
    if masks != "padding":
        options["attn_mask"] = torch.zeros(64, 64)
    if masks != "attn":
        options["key_padding_mask"] = torch.zeros(2, 64).index_fill(1, torch.tensor([63]), -1e4)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x, **options)
    want, want_weights = mha(x, x, x, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=0)
    if need_weights:
        torch.testing.assert_close(weights.float(), want_weights, atol=2e-3, rtol=0)


# ---- falling back ----


def test_nested_tensors_fall_back_with_a_reason():
    mha = nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours = modules.ours_of(mha)
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = mha(x, x, x, need_weights=False)[0].to_padded_tensor(0.0)
        got = ours(x, x, x, need_weights=False)[0].to_padded_tensor(0.0)
    assert torch.equal(got, want)
    assert ft.nn.fallbacks(ours) == {"": {"query is a nested tensor": 1}}


def test_reasons_to_fall_back():
    mha = ft.nn.MultiheadAttention(E, H, dropout=1.0).train()
    x = torch.randn(L, B, E)
    out = mha(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(out, mha.out_proj.bias.expand_as(out))
    mha.eval()(x, x, x)
    assert ft.nn.fallbacks(mha) == {"": {"dropout of 1.0": 1}}
    mha = ft.nn.MultiheadAttention(E, H).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(mha, (x, x, x), check_trace=False)
    torch.testing.assert_close(traced(x, x, x), mha(x, x, x))
    assert ft.nn.fallbacks(mha) == {"": {"torch.jit.trace": 1}}


# ---- being a module ----


def test_state_dict_pickle_deepcopy_to_half():
    torch.manual_seed(1)
    ours = ft.nn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
    torch.manual_seed(1)
    torchs = nn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
    assert isinstance(ours, nn.MultiheadAttention)
    for (name, a), (other, b) in zip(ours.state_dict().items(), torchs.state_dict().items()):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(B, L, E)
    want = ours(x, x, x)[0]
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is ft.nn.MultiheadAttention
        assert torch.equal(copied(x, x, x)[0], want)
    assert ours.half()(x.half(), x.half(), x.half())[0].dtype == torch.float16
    assert ours.to(torch.bfloat16)(*(x.bfloat16(),) * 3)[0].dtype == torch.bfloat16
    assert ours.double()(*(x.double(),) * 3)[0].dtype == torch.float64


def test_hooks_fire():
    mha = ft.nn.MultiheadAttention(E, H)
    seen = []
    mha.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    mha.register_forward_hook(lambda m, args, out: (out[0] + 1, out[1]))
    mha.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = torch.randn(L, B, E, requires_grad=True)
    out = mha(x, x, x)[0]
    out.sum().backward()
    assert seen == ["pre", "backward"]
    torch.testing.assert_close(out, mha.forward(x, x, x)[0] + 1)


def test_parametrizations_are_felt():
    mha = nn.MultiheadAttention(E, H, batch_first=True)
    ours = modules.ours_of(mha)
    for module in (mha, ours):
        for name in ("in_proj_weight", "in_proj_bias"):
            nn.utils.parametrize.register_parametrization(module, name, modules.Doubled())
        nn.utils.parametrize.register_parametrization(module.out_proj, "weight", modules.Doubled())
    x = torch.randn(B, L, E)
    torch.testing.assert_close(ours(x, x, x)[0], mha(x, x, x)[0])


def test_compile_fullgraph_forward_and_backward():
    mha = ft.nn.MultiheadAttention(E, H, batch_first=True)
    compiled = torch.compile(mha, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, L, E, requires_grad=True)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 3:] = True
    for options in (
        {"need_weights": False, "key_padding_mask": padding},
        {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
        {"need_weights": True, "attn_mask": CAUSAL},
    ):
        grads = []
        outs = []
        for module in (mha, compiled):
            mha.zero_grad()
            x.grad = None
            out = module(x, x, x, **options)[0]
            out.square().sum().backward()
            outs.append(out)
            grads.append([x.grad, *(p.grad for p in mha.parameters())])
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("grad", [False, True])
def test_b47_export_with_a_bool_mask(grad):
    # pytorch/pytorch#179287
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ft.nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x, mask):
            out, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
            return out.transpose(0, 1).reshape(-1, E).view(-1)

    model = Model().eval()
    x, mask = torch.randn(B, L, E), CAUSAL
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x, mask))
        torch.testing.assert_close(program.module()(x, mask), model(x, mask))


def test_b46_vmap_and_per_sample_gradients():
    # pytorch/pytorch#151558
    mha = ft.nn.MultiheadAttention(E, H, batch_first=True)
    parameters = {k: v.detach() for k, v in mha.named_parameters()}
    x = torch.randn(4, 2, L, E)
    mask = torch.rand(4, L, L) < 0.3
    mask[..., 0] = False

    def loss(parameters, x, mask):
        call = (x, x, x)
        options = {"attn_mask": mask, "need_weights": False}
        return torch.func.functional_call(mha, parameters, call, options)[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, mask)
    for i in range(4):
        one = torch.func.grad(loss)(parameters, x[i], mask[i])
        for name in one:
            torch.testing.assert_close(grads[name][i], one[name])
