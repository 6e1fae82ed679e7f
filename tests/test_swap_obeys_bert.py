"""A swapped model of transformers' obeys what is done to it (torch's: test_swap_obeys.py)."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

transformers = pytest.importorskip("transformers")

from test_swap_bert import last, padded, sharpen, small  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import fasttransformer as ft  # noqa: E402

FILES = {
    "bert": "transformers.models.bert.modeling_bert",
    "roberta": "transformers.models.roberta.modeling_roberta",
    "distilbert": "transformers.models.distilbert.modeling_distilbert",
}


def model_of(kind, implementation="sdpa"):
    if kind != "distilbert":
        return small(kind, implementation)
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = sharpen(transformers.DistilBertModel(config)).eval()
    model.set_attn_implementation(implementation)
    return model


def halved(function):
    @functools.wraps(function)  # as careful people write it: name and module are the original's
    def run(*args, **kwargs):
        out, weights = function(*args, **kwargs)
        return out / 2, weights

    return run


def replace_function(patch, kind, implementation, how):
    """Puts a function that halves attention's output where the model's forward looks for it."""
    module = importlib.import_module(FILES[kind])
    eager = module.eager_attention_forward
    if how == "registry":
        known = ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
        patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, implementation, halved(known))
    elif how == "registered":
        known = ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, halved(known))
    else:
        patch.setattr(module, "eager_attention_forward", halved(eager))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("implementation", "how"),
    [("sdpa", "registry"), ("sdpa", "registered"), ("eager", "registry"), ("eager", "function")],
)
@pytest.mark.parametrize("kind", FILES)
def test_b105_attention_functions(kind, implementation, how, when, monkeypatch):
    """b105 (transformers#46132): functions put into the registry under a name that is there."""
    original = model_of(kind, implementation)
    swapped = copy.deepcopy(original)
    inputs = padded()
    before = last(original, **inputs)
    with monkeypatch.context() as patch:
        if when == "after":
            ft.swap(swapped)
        replace_function(patch, kind, implementation, how)
        if when == "before":
            report = ft.swap(swapped)
            reasons = {s.reason for s in report.skipped if "Attention" in s.source.__name__}
            assert reasons == {f"the attention function that it calls, {implementation!r}, is "
                               "replaced"}  # fmt: skip
        want = last(original, **inputs)
        assert not torch.allclose(want, before, atol=1e-3)
        torch.testing.assert_close(last(swapped, **inputs), want, atol=1e-5, rtol=1e-4)
        if when == "after":
            assert f"the attention function {implementation!r} is replaced" in str(
                ft.nn.fallbacks(swapped)
            )
    torch.testing.assert_close(last(swapped, **inputs), before, atol=1e-5, rtol=1e-4)


def test_b105_a_name_of_its_own():
    original = model_of("bert")
    ALL_ATTENTION_FUNCTIONS.register("halved", halved(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    try:
        swapped = copy.deepcopy(original)
        ft.swap(swapped)
        inputs = padded()
        before = last(original, **inputs)
        for model in (original, swapped):
            model.set_attn_implementation("halved")
        want = last(original, **inputs)
        assert not torch.allclose(want, before, atol=1e-3)
        torch.testing.assert_close(last(swapped, **inputs), want, atol=1e-5, rtol=1e-4)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["halved"]


CLASSES = {
    "bert": ["BertSelfAttention", "BertSelfOutput", "BertIntermediate", "BertOutput", "BertLayer"],
    "distilbert": ["DistilBertSelfAttention", "FFN", "TransformerBlock"],
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, ns in CLASSES.items() for n in ns])
def test_a_forward_that_is_replaced_on_the_class(kind, name, when, monkeypatch):
    original = model_of(kind)
    swapped = copy.deepcopy(original)
    cls = getattr(importlib.import_module(FILES[kind]), name)
    forward = cls.forward

    @functools.wraps(forward)
    def halved(*args, **kwargs):
        out = forward(*args, **kwargs)
        return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2

    if when == "after":
        ft.swap(swapped)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", halved)
        if when == "before":
            reasons = {s.source.__name__: s.reason for s in ft.swap(swapped).skipped}
            assert reasons[name] == f"the forward of {name} is replaced"
        inputs = padded()
        want = last(original, **inputs)
        torch.testing.assert_close(last(swapped, **inputs), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(last(original, **inputs), want, atol=1e-3)


# ---- adapters, hooks, pruning, parametrizations -------------------------------------------------


class Wrapped(nn.Module):
    """A LoRA-like adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        torch.manual_seed(2)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrapped(parent, name):
    setattr(parent, name, Wrapped(getattr(parent, name)))


def hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda m, args, out: out * 1.5)


def pruned(parent, name):
    prune.random_unstructured(getattr(parent, name), "weight", 0.5)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def parametrized(parent, name):
    parametrize.register_parametrization(getattr(parent, name), "weight", Half())


def quantized(parent, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = nn.Sequential(copy.deepcopy(getattr(parent, name)))
        ft.restore(part)
        part = torch.ao.quantization.quantize_dynamic(part, {nn.Linear})
    setattr(parent, name, part[0])


def no_parameter(parent, name):
    part = getattr(parent, name)
    weight = part.weight.detach() * 2
    del part.weight
    part.weight = weight


PARTS = ["attention.self.query", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense", "output.LayerNorm"]  # fmt: skip
ADDED = [wrapped, hook, pruned, parametrized, quantized, no_parameter]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("add", ADDED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("part", PARTS)
def test_b107_what_is_put_on_a_part(part, add, when):
    """b107 (peft#2556): adapters on linear layers whose weight a fused kernel reads."""
    if "Norm" in part and add in (wrapped, quantized):
        pytest.skip("of linear layers only")
    original = small("bert")
    swapped = copy.deepcopy(original)
    inputs = padded()
    before = last(original, **inputs)
    if when == "after":
        ft.swap(swapped)
    for model in (original, swapped):
        torch.manual_seed(3)
        parent, _, name = f"encoder.layer.1.{part}".rpartition(".")
        add(model.get_submodule(parent), name)
    if when == "before":
        report = ft.swap(swapped)
        assert report.swapped and (report.skipped or add is no_parameter)
    want = last(original, **inputs)
    assert (want - before).abs().max() > 1e-3
    torch.testing.assert_close(last(swapped, **inputs), want, atol=1e-5, rtol=1e-4)
    if when == "after" and add not in (parametrized, no_parameter):  # those are read
        assert any(parent in name for name in ft.nn.fallbacks(swapped))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="no peft")
@pytest.mark.parametrize("when", ["before", "after"])
def test_b107_peft(when):
    import peft

    def adapted(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    original, swapped = small("bert"), small("bert")
    if when == "after":
        ft.swap(swapped)
    original, swapped = adapted(original), adapted(swapped)
    if when == "before":
        ft.swap(swapped)
    inputs = padded()
    torch.testing.assert_close(
        last(swapped, **inputs), last(original, **inputs), atol=1e-5, rtol=1e-4
    )
    for model in (original, swapped):
        model(**inputs).last_hidden_state.square().sum().backward()
    ours = {n: p.grad for n, p in swapped.named_parameters() if "lora" in n}
    for name, parameter in original.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-3, rtol=1e-3)


def test_a_changed_activation():
    for change in ("replaced", "inside", "hook"):
        original, swapped = small("bert"), small("bert")
        ft.swap(swapped)
        before = last(original, **padded())
        for model in (original, swapped):
            for layer in model.encoder.layer:
                if change == "replaced":
                    layer.intermediate.intermediate_act_fn = nn.Tanh()
                elif change == "inside":
                    layer.intermediate.intermediate_act_fn.act = torch.tanh
                else:
                    layer.intermediate.intermediate_act_fn.register_forward_hook(
                        lambda m, args, out: out * 1.5
                    )
        inputs = padded()
        want = last(original, **inputs)
        torch.testing.assert_close(last(swapped, **inputs), want, atol=1e-5, rtol=1e-4)
        assert want.shape == before.shape


def halved_chunk(chunk, x):
    return chunk(x) / 2


def test_a_replaced_feed_forward_chunk():
    original, swapped = small("bert"), small("bert")
    ft.swap(swapped)
    for model in (original, swapped):
        layer = model.encoder.layer[0]
        layer.feed_forward_chunk = functools.partial(halved_chunk, layer.feed_forward_chunk)
    inputs = padded()
    torch.testing.assert_close(
        last(swapped, **inputs), last(original, **inputs), atol=1e-5, rtol=1e-4
    )


# ---- tracers, subclasses ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_torch_jit_trace_with_gradients(kind):
    model = model_of(kind)
    inputs = padded()
    want = last(model, **inputs)
    ft.swap(model)
    model.config.return_dict = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            model, (inputs["input_ids"], inputs["attention_mask"]), check_trace=False
        )
    assert "fasttransformer::" not in str(traced.inlined_graph)
    got = traced(inputs["input_ids"], inputs["attention_mask"])[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_subclasses_of_tensor(kind):
    original, swapped = model_of(kind), model_of(kind)
    ft.swap(swapped)
    x = torch.randn(2, 7, 32).as_subclass(Marked)
    got, want = (last(m, inputs_embeds=x) for m in (swapped, original))
    assert type(got) is type(want) is Marked
    torch.testing.assert_close(
        got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_plain_path_stays_ours(kind):
    model = model_of(kind)
    ft.swap(model)
    last(model, **padded())
    torch.compile(model, backend="eager")(**padded())
    assert not ft.nn.fallbacks(model)


def test_the_reason_names_a_class_that_is_also_called_linear():
    class Linear(Wrapped):  # as peft's and torch's quantized ones are
        pass

    model = small("bert")
    attention = model.encoder.layer[0].attention.self
    attention.query = Linear(attention.query)
    reasons = {s.name: s.reason for s in ft.swap(model).skipped}
    assert reasons["encoder.layer.0.attention.self"] == (
        f"its part query is not torch.nn.Linear itself but a {__name__}.{Linear.__qualname__}, "
        "which has to be called"
    )
