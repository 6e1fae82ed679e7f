"""ft.swap, ft.restore and report.verify on torch.nn modules (transformers: test_swap_bert.py)."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from swap_model import D, Net, ids
from torch import nn
from torch.nn.utils import prune

import fasttransformer as ft
from fasttransformer import patterns
from fasttransformer.patterns import swapped_from


def encoder_layer(**options):
    settings = dict(d_model=D, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(**{**settings, **options})


def run(model, *args):
    with torch.no_grad():
        return model(*args)["probabilities"]


# ---- swapping and restoring ---------------------------------------------------------------------


def test_every_class_of_torch_is_swapped_and_restored():
    model = Net().eval()
    before, out = [type(m) for m in model.modules()], run(model, ids())
    inside = [set(vars(m)) for m in model.modules()]
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    report = ft.swap(model)
    assert not report.skipped, str(report)
    found = {s.source.__name__ for s in report.swapped}
    assert found == {"LayerNorm", "RMSNorm", "Softmax", "Linear", "MultiheadAttention",
                     "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
                     "TransformerDecoder"}  # fmt: skip
    for entry in report.swapped:
        module = model.get_submodule(entry.name)
        assert type(module) is entry.target and issubclass(entry.target, entry.source)
        assert isinstance(module, getattr(ft.nn, entry.source.__name__))
    assert torch.allclose(run(model, ids()), out, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert ft.restore(model) == len(report.swapped)
    assert [type(m) for m in model.modules()] == before
    assert [set(vars(m)) for m in model.modules()] == inside
    assert torch.equal(run(model, ids()), out)
    assert ft.restore(model) == 0


def test_swapping_twice_says_so():
    model = Net()
    first = ft.swap(model)
    second = ft.swap(model)
    assert not second.swapped and len(second.already) == len(first.swapped)
    assert f"nothing to do: {len(first.swapped)} swapped before" in str(second)


def test_nothing_to_swap_says_so():
    report = ft.swap(nn.Sequential(nn.Embedding(3, 4), nn.Conv1d(1, 1, 1)))
    assert not report.swapped and not report.skipped
    assert "nothing to swap" in str(report)


def test_classes_without_a_pattern_are_counted():
    class QwenRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class QwenMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 8)

    class QwenRotaryEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(2))

    class QwenAttention(nn.Module):  # listed with a reason, and so not counted
        scale = nn.Parameter(torch.ones(()))

    parts = [QwenRMSNorm(), QwenRMSNorm(), QwenMLP(), QwenRotaryEmbedding(), QwenAttention(),
             nn.Embedding(3, 4), nn.Dropout(), nn.ReLU(), nn.LayerNorm(4)]  # fmt: skip
    report = ft.swap(nn.Sequential(*parts))
    assert report.without_pattern == {"QwenRMSNorm": 2, "QwenMLP": 1, "QwenRotaryEmbedding": 1,
                                      "torch.nn.Embedding": 1}  # fmt: skip
    line = "no pattern for: 2 QwenRMSNorm, 1 QwenMLP, 1 QwenRotaryEmbedding, 1 torch.nn.Embedding"
    assert line in str(report).splitlines()


def test_the_reports_repr_is_short():
    report = ft.swap(Net())
    assert repr(report) == (
        f"<swap of a Net: {len(report.swapped)} modules swapped, 0 left alone; print it for the "
        "list>"
    )


def test_the_model_itself_can_be_swapped():
    norm = nn.LayerNorm(4)
    report = ft.swap(norm)
    assert isinstance(norm, ft.nn.LayerNorm) and "the model itself" in str(report)
    ft.restore(norm)
    assert type(norm) is nn.LayerNorm


def test_modules_that_a_user_built_from_ft_nn_are_not_touched():
    model = nn.Sequential(ft.nn.LayerNorm(4), nn.LayerNorm(4))
    report = ft.swap(model)
    assert [s.name for s in report.swapped] == ["1"] and not report.skipped
    assert ft.restore(model) == 1
    assert type(model[0]) is ft.nn.LayerNorm and type(model[1]) is nn.LayerNorm


def test_a_module_under_two_names_is_swapped_once():
    norm = nn.LayerNorm(4)
    report = ft.swap(nn.Sequential(norm, norm))
    assert len(report.swapped) == 1


@pytest.mark.parametrize("bad", [None, 3, torch.nn.LayerNorm])
def test_bad_input(bad):
    with pytest.raises(TypeError, match=r"swap: model must be a torch\.nn\.Module"):
        ft.swap(bad)
    with pytest.raises(TypeError, match=r"restore: model must be a torch\.nn\.Module"):
        ft.restore(bad)


# ---- what a swapped model survives --------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_stay_swapped_and_can_be_restored(copied):
    model = Net().eval()
    before = [type(m) for m in model.modules()]
    ft.swap(model)
    out = run(model, ids())
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(run(twin, ids()), out)
    ft.restore(twin)
    assert [type(m) for m in twin.modules()] == before
    assert any(swapped_from(m) for m in model.modules())  # the copy's restore is the copy's own


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_b39_an_activation_module_survives(when, copied):
    """b39 (pytorch#81832): SiLU() became ReLU on unpickling."""
    layer = encoder_layer(activation=nn.SiLU()).eval()
    x = torch.randn(2, 5, D)
    want = layer(x)
    if when == "before":
        layer = copied(layer)
    ft.swap(layer)
    if when == "after":
        layer = copied(layer)
    assert torch.allclose(layer(x), want, atol=1e-5)
    ft.restore(layer)
    assert torch.equal(layer(x), want)


def test_casts_modes_and_state_dicts():
    model, other = Net().eval(), Net().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    ft.swap(model)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(run(model, ids()), run(other, ids()), atol=1e-6)
    assert run(model.bfloat16(), ids()).dtype == torch.bfloat16
    assert run(model.half(), ids()).dtype == torch.float16
    assert run(model.double(), ids()).dtype == torch.float64
    assert torch.allclose(run(model.float(), ids()), run(other, ids()), atol=1e-2)
    assert model.train().encoder.layers[0].training and not model.eval().training
    assert next(model.to("meta").parameters()).device.type == "meta"
    assert all(p.requires_grad for p in model.parameters())


def test_hooks_and_attributes_stay():
    model = Net().eval()
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append("head"))
    model.rms.register_forward_pre_hook(lambda *_: seen.append("rms"))
    model.head.note = "mine"
    report = ft.swap(model)
    assert not report.skipped, str(report)  # hooks on a swapped module itself are called
    run(model, ids())
    assert seen == ["rms", "head"] and model.head.note == "mine"


def test_compiles():
    model = Net().eval()
    ft.swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(run(compiled, ids()), run(model, ids()), atol=1e-6)


def test_compiled_before_the_swap():
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)).eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, D)
    want = compiled(x)
    assert len(ft.swap(compiled).swapped) == 2
    assert torch.allclose(compiled(x), want, atol=1e-5)
    ft.restore(compiled)
    assert torch.allclose(compiled(x), want, atol=1e-6)


def test_trains_and_keeps_the_optimizer():
    model = Net(dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ft.swap(model)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = -model(ids())["probabilities"][..., 3].log().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_b66_meta_device_tied_weights():
    """b66 (modalities#357): tied weights part ways under meta-device init."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.norm = nn.Embedding(20, D), nn.LayerNorm(D)
            self.lm_head = nn.Linear(D, 20, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, x):
            return self.lm_head(self.norm(self.wte(x)))

    with torch.device("meta"):
        model = Tied()
    assert len(ft.swap(model).swapped) == 2
    assert model.lm_head.weight is model.wte.weight
    model.to_empty(device="cpu")
    model.lm_head.weight = model.wte.weight  # to_empty parts them in plain torch as well
    model.load_state_dict(Tied().state_dict())
    assert model.lm_head.weight is model.wte.weight
    model(ids()).sum().backward()
    assert model.lm_head.weight.grad is model.wte.weight.grad
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.wte.weight
    ft.restore(model)
    assert model.lm_head.weight is model.wte.weight


# ---- known faults of torch's layers, through a swap ---------------------------------------------


@pytest.mark.parametrize("padding", [False, True])
def test_b34_float_masks_in_eval(padding):
    """b34 (pytorch#118628): a real-valued src_mask is cast to bool in eval: NaN or wrong."""
    layer = encoder_layer(d_model=8)
    x, mask = torch.randn(3, 5, 8), torch.randn(5, 5)
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[1, 3:] = True
    args = (x, mask, pad.float().masked_fill(pad, -torch.inf) if padding else None)
    want = layer.train()(*args)
    ft.swap(layer)
    with torch.no_grad():
        assert torch.allclose(layer.eval()(*args), want, atol=1e-5)
        assert torch.allclose(layer.train()(*args), want, atol=1e-5)


def test_b29_dropout_ends_in_eval():
    """b29 (pytorch#124464): modules built with dropout 0.5, then eval, twice."""
    model = Net(dropout=0.5).eval()
    want = run(model, ids())
    ft.swap(model)
    assert torch.equal(run(model, ids()), run(model, ids()))
    assert torch.allclose(run(model, ids()), want, atol=1e-6)
    model.train()
    assert not torch.equal(run(model, ids()), run(model, ids()))


def test_the_nested_tensor_path_of_torchs_encoder():
    """In eval with padding torch hands nested tensors to its layers, and cuts the output short."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, pad = torch.randn(3, 6, D), torch.zeros(3, 6, dtype=torch.bool)
    pad[0, 4:] = pad[1, 2:] = True
    want = encoder.train()(x, src_key_padding_mask=pad)
    ft.swap(encoder)
    with torch.no_grad():
        got = encoder.eval()(x, src_key_padding_mask=pad)
    assert torch.allclose(got[~pad], want[~pad], atol=1e-5)
    whole = nn.TransformerEncoder(encoder_layer(), 2).eval()
    whole.register_forward_hook(lambda *_: None)
    for layer in whole.layers:  # only the layers, as when the stack is of a class of one's own
        ft.swap(layer)
    with torch.no_grad():
        assert whole(x, src_key_padding_mask=pad)[~pad[:, : x.shape[1]]].isfinite().all()


# ---- what is left alone, and why ----------------------------------------------------------------


def reasons(report):
    return {s.name: s.reason for s in report.skipped}


class Child(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses_replaced_forwards_and_parametrizations():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"} | {"norm": Child(4)})
    model.a.forward = lambda x: x
    nn.utils.parametrizations.orthogonal(model.b)
    prune.l1_unstructured(model.c, "weight", 0.5)
    report = ft.swap(model)
    found = reasons(report)
    assert found["a"] == "its forward is replaced on this instance"
    assert found["b"] == "it is parametrized"
    assert "computed by a hook" in found["c"]
    assert found["norm"] == "a subclass of torch.nn.LayerNorm that is not known"
    assert [s.name for s in report.swapped] == ["d"]
    assert "left alone:" in str(report) and "parametrized" in str(report)
    ft.restore(model)
    assert type(model.norm) is Child


def test_hooks_inside_a_fused_layer():
    layer = encoder_layer()
    seen = []
    layer.linear2.register_forward_hook(lambda *_: seen.append(1))
    report = ft.swap(layer)
    assert "linear2 has a hook" in reasons(report)[""]
    assert type(layer) is nn.TransformerEncoderLayer
    layer(torch.randn(1, 3, D))
    assert seen == [1]


def test_a_layer_with_parts_that_are_not_torchs():
    layer = encoder_layer()
    layer.norm1 = Child(D)
    assert "norm1 is a Child" in reasons(ft.swap(layer))[""]
    layer = encoder_layer()
    nn.utils.parametrizations.weight_norm(layer.linear1)
    found = reasons(ft.swap(layer))
    assert "linear1" in found[""] and found["linear1"] == "it is parametrized"


def test_a_stack_with_layers_of_ones_own():
    class Mine(nn.TransformerEncoderLayer):
        pass

    stack = nn.TransformerEncoder(Mine(D, 2, 32, batch_first=True), 2)
    found = reasons(ft.swap(stack))
    assert "layers.0 is a Mine" in found[""]
    assert found["layers.1"] == "a subclass of torch.nn.TransformerEncoderLayer that is not known"


def test_quantized_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    report = ft.swap(quantized)
    assert [s.name for s in report.swapped] == ["1"]


def test_tensor_subclasses():
    class Marked(torch.Tensor):
        pass

    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked))
    assert reasons(ft.swap(linear))[""] == "weight is a Marked"


def test_script_modules():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.LayerNorm(4))), nn.LayerNorm(4))
    report = ft.swap(model)
    assert reasons(report) == {"0": "it is a TorchScript module"}
    assert [s.name for s in report.swapped] == ["1"]


def test_inside_fully_sharded_data_parallel():
    class FullyShardedDataParallel(nn.Module):  # the name is all that the rule looks at
        def __init__(self, module):
            super().__init__()
            self.module = module

    report = ft.swap(FullyShardedDataParallel(nn.Sequential(nn.LayerNorm(4))))
    assert "swap before wrapping" in reasons(report)["module.0"]


def test_softmax_without_dim_and_a_class_that_only_has_the_name():
    assert "dim is None" in reasons(ft.swap(nn.Softmax()))[""]
    fake = type("LayerNorm", (nn.LayerNorm,), {"__module__": "torch.nn.modules.normalization"})
    fake.__qualname__ = "LayerNorm"
    assert "another class" in reasons(ft.swap(fake(4)))[""]


def test_attention_without_a_pattern_is_named():
    class TheirAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(4, 4)

    report = ft.swap(nn.Sequential(TheirAttention()))
    assert reasons(report)["0"] == "there is no pattern for this class yet"
    assert [s.name for s in report.swapped] == ["0.to_q"]


def test_without_the_cpu_library_nothing_gets_slower(monkeypatch):
    monkeypatch.setattr(patterns, "unavailable", lambda name: "it was not built")
    monkeypatch.setattr(patterns, "forced_backend", lambda: None)
    assert "it was not built" in reasons(ft.swap(nn.LayerNorm(4)))[""]
    with torch.device("meta"):
        assert ft.swap(nn.LayerNorm(4)).swapped  # its device is not known yet
