"""ft.swap on transformers' BERT family: a small random model of each kind."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import os
import pickle
import re

import pytest
import torch
from torch.nn.utils import prune

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import fasttransformer as ft  # noqa: E402
from fasttransformer.integrations import bert, distilbert  # noqa: E402
from fasttransformer.patterns import TABLE, swapped_from  # noqa: E402

SMALL = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def small(kind: str, implementation: str = "sdpa", head: str = "Model", **options):
    names = {"bert": "Bert", "roberta": "Roberta", "xlm": "XLMRoberta", "electra": "Electra",
             "camembert": "Camembert", "ernie": "Ernie", "data2vec": "Data2VecText",
             "generation": "BertGeneration", "xmod": "Xmod", "mpnet": "MPNet",
             "layoutlm": "LayoutLM", "rembert": "RemBert", "roformer": "RoFormer"}  # fmt: skip
    prefix = names[kind]
    config_name = {"BertGeneration": "BertGeneration"}.get(prefix, prefix) + "Config"
    settings = {**SMALL, "pad_token_id": 1, **options}
    if kind == "electra":
        settings["embedding_size"] = 16
    if kind == "xmod":
        settings |= {"languages": ["en_XX"], "default_language": "en_XX"}
    config = getattr(transformers, config_name)(**settings)
    head = {"BertGenerationModel": "Encoder"}.get(prefix + head, head)
    torch.manual_seed(1)
    model = getattr(transformers, prefix + head)(config)
    model.set_attn_implementation(implementation)
    return sharpen(model).eval()


def sharpen(model):
    """Random weights of 0.02 make attention uniform and hide faults: use larger ones."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(8)
            elif "LayerNorm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.1)
    return model


def padded(batch=3, length=11, side="right"):
    ids = torch.randint(2, 60, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        cut = 2 * row
        mask[row, -cut:] = 0
    if side == "left":
        mask = mask.flip(-1)
    return {"input_ids": ids, "attention_mask": mask}


def classes(model):
    return [type(m) for m in model.modules()]


def last(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


# ---- the table ----------------------------------------------------------------------------------


def _normal_form(cls: type, prefix: str) -> str:
    """A class's code without docstrings, comments and the model's own name."""
    tree = ast.parse(inspect.getsource(cls))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return re.sub(rf"\b{prefix}(?=[A-Z])", "Bert", ast.unparse(tree))


@pytest.mark.parametrize("file", list(bert.FAMILIES))
def test_every_class_of_the_table_is_written_as_berts(file):
    prefix, parts = bert.FAMILIES[file]
    module = importlib.import_module(f"transformers.models.{file}")
    known = importlib.import_module("transformers.models.bert.modeling_bert")
    for part in parts:
        cls = getattr(module, prefix + part)
        assert _normal_form(cls, prefix) == _normal_form(getattr(known, "Bert" + part), "Bert")


def test_targets_are_importable_and_know_their_source():
    for pattern in TABLE.values():
        target = pattern.target_class()
        assert target.__dict__["_ft_swapped_from"] is pattern.source_class()
        assert pickle.loads(pickle.dumps(target)) is target
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = bert.Nothing
    assert distilbert.FFN.__module__ == "fasttransformer.integrations.distilbert"


def test_importing_the_package_does_not_import_transformers():
    import subprocess
    import sys

    code = "import sys, fasttransformer, torch; fasttransformer.swap(torch.nn.LayerNorm(2)); "
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- small models of every kind -----------------------------------------------------------------

KINDS = ["bert", "roberta", "xlm", "electra", "camembert", "ernie", "data2vec", "generation",
         "xmod", "mpnet", "layoutlm", "rembert", "roformer"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    model = small(kind, "sdpa" if kind in KINDS[:9] else "eager")
    report = ft.swap(model)
    assert any(s.target.__module__ == bert.__name__ for s in report.swapped), str(report)
    check = report.verify(**padded(), show=False)
    assert check.ok, f"{report}\n{check}"
    ft.restore(model)
    assert not any(swapped_from(m) for m in model.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
def test_distilbert_and_activations(implementation, activation):
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0, activation=activation,
    )  # fmt: skip
    model = sharpen(transformers.DistilBertModel(config)).eval()
    model.set_attn_implementation(implementation)
    report = ft.swap(model)
    names = {s.target.__name__ for s in report.swapped}
    assert {"DistilBertSelfAttention", "FFN", "TransformerBlock"} <= names
    check = report.verify(**padded(), show=False)
    assert check.ok, str(check)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_activations(activation):
    report = ft.swap(small("bert", hidden_act=activation))
    assert "Intermediate" in str(report)
    assert report.verify(**padded(), show=False).ok


def test_a_feed_forward_in_chunks():
    model = small("bert", chunk_size_feed_forward=1)
    assert ft.swap(model).verify(**padded(), show=False).ok


def test_an_activation_without_a_kernel_is_named():
    report = ft.swap(small("bert", hidden_act="quick_gelu"))
    reasons = {s.reason for s in report.skipped if s.source.__name__ == "BertIntermediate"}
    assert len(reasons) == 1 and "no kernel" in reasons.pop()
    assert report.verify(**padded(), show=False).ok


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_padding(implementation, side, decoder):
    """Left padding under a causal mask gives rows that see no key: no NaN (see facts on eager)."""
    model = small("bert", implementation, is_decoder=decoder, use_cache=False)
    inputs = padded(side=side)
    report = ft.swap(model)
    check = report.verify(**inputs, show=False)
    assert check.ok, str(check)
    out = last(model, **inputs)
    assert out.isfinite().all()
    kept = inputs["attention_mask"].bool()
    scrambled = inputs["input_ids"].where(kept, 59 - inputs["input_ids"].clamp(0, 50))
    changed = last(model, input_ids=scrambled, attention_mask=inputs["attention_mask"])
    assert torch.allclose(out[kept], changed[kept], atol=1e-6)  # padding is not felt


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sample_of_padding_only(implementation):
    inputs = padded()
    inputs["attention_mask"][1] = 0
    model = small("bert", implementation)
    ft.swap(model)
    out = model(**inputs).last_hidden_state
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_4d_masks(implementation):
    """Masks as users make them: float biases per head, bool of any shape that broadcasts."""
    model = small("bert", implementation)
    inputs = {"inputs_embeds": torch.randn(2, 7, 32)}
    report = ft.swap(model)
    float_mask = torch.randn(2, 4, 7, 7)
    check = report.verify(**inputs, attention_mask=float_mask, show=False)
    assert check.ok, str(check)


@pytest.mark.skipif(ft.backends()["triton"] is not None, reason="no Triton")
def test_float_masks_with_gradients_run_on_triton():
    """Left padding under eager's causal mask: rows of finfo.min, whose gradients Triton has too."""
    model = small("bert", "eager", is_decoder=True, use_cache=False)
    inputs = padded(side="left", length=7)
    theirs = copy.deepcopy(model)
    ft.swap(model)
    calls = []
    original = ft.attention

    def recorded(*args, **options):
        calls.append(options["bias"])
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, ft.use_backend("triton"):
        patch.setattr(bert, "attention", recorded)
        model(**inputs).last_hidden_state.square().sum().backward()
    assert len(calls) == 2 and (calls[0] == torch.finfo(torch.float32).min).all(-1).any()
    theirs(**inputs).last_hidden_state.square().sum().backward()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)
    # Nor does a device that is not the CPU keep them from it.
    module, meta = model.encoder.layer[0].attention.self, torch.empty(2, 7, 32, device="meta")
    assert module._why_original_attention(meta, calls[0].to("meta"), {}) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_b31_decoder_is_causal(implementation):
    """b31 (keras#23038): causality dropped on a side path (weights wanted, padding, no mask)."""
    model = small("bert", implementation, is_decoder=True, use_cache=False)
    ft.swap(model)
    ids = torch.randint(2, 60, (2, 6))
    other = ids.clone()
    other[:, 5] = 1 + ids[:, 5] % 50
    for extra in ({}, {"attention_mask": torch.ones_like(ids)}, {"output_attentions": True}):
        a, b = last(model, input_ids=ids, **extra), last(model, input_ids=other, **extra)
        assert torch.equal(a[:, :5], b[:, :5])
        assert not torch.equal(a[:, 5], b[:, 5])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_b67_cross_attention(implementation):
    """b67 (transformers#47946): the memory's padding mask, and b32: cross is never causal."""
    model = small("bert", implementation, is_decoder=True, add_cross_attention=True)
    report = ft.swap(model)
    assert any(s.target.__name__ == "BertCrossAttention" for s in report.swapped)
    memory, mask = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.long)
    mask[0, 2:] = 0
    inputs = dict(input_ids=torch.randint(2, 60, (2, 9)), use_cache=False)
    check = report.verify(
        **inputs, encoder_hidden_states=memory, encoder_attention_mask=mask, show=False
    )
    assert check.ok, str(check)
    scrambled = memory.clone()
    scrambled[0, 2:] = 100 * torch.randn(2, 32)
    out = last(model, **inputs, encoder_hidden_states=memory, encoder_attention_mask=mask)
    same = last(model, **inputs, encoder_hidden_states=scrambled, encoder_attention_mask=mask)
    assert torch.allclose(out, same, atol=1e-6)
    moved = memory.clone()
    moved[1, 3] += 1
    other = last(model, **inputs, encoder_hidden_states=moved, encoder_attention_mask=mask)
    assert ((out - other)[1].abs().amax(-1) > 0).all()  # every target position sees the last key


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_cache_runs_the_original(implementation, cross):
    model = small("bert", implementation, is_decoder=True, add_cross_attention=cross)
    extra = {"encoder_hidden_states": torch.randn(2, 4, 32)} if cross else {}
    ids = torch.randint(2, 60, (2, 6))

    def step_by_step():
        with torch.no_grad():
            first = model(ids[:, :4], use_cache=True, **extra)
            outs, cache = [first.last_hidden_state], first.cache
            for i in (4, 5):
                out = model(ids[:, i : i + 1], cache=cache, use_cache=True, **extra)
                outs.append(out.last_hidden_state)
                cache = out.cache
        return torch.cat(outs, 1)

    theirs = step_by_step()
    ft.swap(model)
    assert torch.allclose(step_by_step(), theirs, atol=1e-5)
    assert torch.allclose(last(model, input_ids=ids, use_cache=False, **extra), theirs, atol=1e-5)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_output_attentions_and_hidden_states(how):
    model = small("bert", "eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    if how == "config":
        model.config.output_attentions = model.config.output_hidden_states = True
        options = {}
    inputs = padded()
    theirs = copy.deepcopy(model)(**inputs, **options)
    ft.swap(model)
    ours = model(**inputs, **options)
    assert len(ours.attentions) == 2 and len(ours.hidden_states) == 3
    for a, b in zip(ours.attentions + ours.hidden_states, theirs.attentions + theirs.hidden_states):
        assert torch.allclose(a, b, atol=1e-4)
    if how == "argument":  # and the next call, on the hooks that transformers left, is ours again
        assert model(**inputs).attentions is None
        assert torch.allclose(last(model, **inputs), ours.last_hidden_state, atol=1e-4)


def test_output_attentions_with_sdpa_are_as_transformers_gives_them():
    model = small("bert", "sdpa")
    theirs = model(**padded(), output_attentions=True).attentions
    ft.swap(model)
    assert len(model(**padded(), output_attentions=True).attentions) == len(theirs)


def test_output_hidden_states_stay_ours():
    model = small("bert", "sdpa")
    inputs = padded()
    theirs = model(**inputs, output_hidden_states=True)
    ft.swap(model)
    ours = model(**inputs, output_hidden_states=True)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# ---- training -----------------------------------------------------------------------------------


def test_training_without_dropout():
    model = small("bert").train()
    report = ft.swap(model)
    check = report.verify(**padded(), show=False)
    assert check.ok and not check.notes, str(check)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_training_with_dropout(kind):
    """b29 (pytorch#124464): dropout works in training, repeats under a seed, and ends in eval."""
    if kind == "bert":
        model = small("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    else:
        config = transformers.DistilBertConfig(
            vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
            max_position_embeddings=40, dropout=0.2, attention_dropout=0.2,
        )  # fmt: skip
        model = transformers.DistilBertModel(config).eval()
    inputs = padded()
    report = ft.swap(model)
    quiet = last(model, **inputs)
    assert torch.equal(last(model, **inputs), quiet)
    model.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.zero_grad()
        model(**inputs).last_hidden_state.square().sum().backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2]))
    grads = [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    check = report.verify(**inputs, show=False)
    assert check.ok, str(check)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters())))
    assert torch.equal(last(model.eval(), **inputs), quiet)


def test_gradient_checkpointing_replays_the_same_dropout():
    model = small("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
    ft.swap(model)
    inputs = padded()

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(**inputs).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, gradients()))


def test_b66_tied_weights_stay_tied():
    """b66 (modalities#357): embedding and output weight part ways."""
    model = small("bert", head="ForMaskedLM")
    inputs = padded() | {"labels": torch.randint(2, 60, (3, 11))}
    report = ft.swap(model)
    check = report.verify(**inputs, show=False)
    assert check.ok, str(check)
    decoder, words = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert decoder.weight is words.weight
    twin = copy.deepcopy(model)
    assert twin.cls.predictions.decoder.weight is twin.bert.embeddings.word_embeddings.weight
    model(**inputs).loss.backward()
    assert decoder.weight.grad is words.weight.grad
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ft.restore(model)
    assert decoder.weight is words.weight


def test_b66_meta_device():
    config = transformers.BertConfig(**SMALL)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config).eval()
    report = ft.swap(model)
    assert len(report.swapped) >= 8
    real = transformers.BertForMaskedLM(config).eval()
    model.load_state_dict(real.state_dict(), assign=True)
    model.tie_weights()
    embeddings = real.bert.embeddings
    for name, buffer in embeddings.named_buffers():
        setattr(model.bert.embeddings, name, buffer)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        inputs = padded()
        assert torch.allclose(model(**inputs).logits, real(**inputs).logits, atol=1e-4)


# ---- what is left alone -------------------------------------------------------------------------


def skipped_reason(report, name):
    return {s.name: s.reason for s in report.skipped}.get(name)


def test_hooks_on_parts_keep_the_parent():
    model = small("bert")
    seen = []
    layer = model.encoder.layer[0]
    layer.output.dense.register_forward_hook(lambda *_: seen.append("dense"))
    layer.attention.output.LayerNorm.register_forward_pre_hook(lambda *_: seen.append("norm"))
    layer.attention.self.register_forward_hook(lambda *_: seen.append("self"))
    report = ft.swap(model)
    assert "hook" in skipped_reason(report, "encoder.layer.0.output")
    assert "hook" in skipped_reason(report, "encoder.layer.0.attention.output")
    assert swapped_from(layer.attention.self) is not None
    last(model, **padded())
    assert sorted(seen) == ["dense", "norm", "self"]
    assert report.verify(**padded(), show=False).ok


def test_hooks_after_the_swap_fire_too():
    model = small("bert")
    ft.swap(model)
    inputs = padded()
    before = last(model, **inputs)
    seen = []
    layer = model.encoder.layer[1]
    for part in (layer.output.LayerNorm, layer.attention.self.query, layer.intermediate.dense):
        part.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(last(model, **inputs), before, atol=1e-4)
    assert len(seen) == 3
    handle = layer.attention.output.dense.register_forward_hook(lambda m, a, out: out * 0)
    assert not torch.allclose(last(model, **inputs), before, atol=1e-2)
    handle.remove()


def test_a_forward_replaced_after_the_swap_runs():
    """accelerate's hooks are made so: a ``forward`` among the instance's own attributes."""
    model = small("bert")
    ft.swap(model)
    inputs = padded()
    before = last(model, **inputs)
    for part in (model.encoder.layer[1].output.dense, model.encoder.layer[0].attention.self.key):
        part.forward = lambda x, own=part.forward: own(x) * 0
        assert not torch.allclose(last(model, **inputs), before, atol=1e-2)
        del part.forward
        assert torch.equal(last(model, **inputs), before)


def test_global_hooks_see_every_module():
    model = small("bert")
    ft.swap(model)
    names = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(id(module))
    )
    try:
        last(model, **padded())
    finally:
        hook.remove()
    assert id(model.encoder.layer[0].attention.self.key) in names
    assert id(model.encoder.layer[0].output.LayerNorm) in names


def test_parts_that_are_not_plain():
    model = small("bert")
    a, b = model.encoder.layer[0], model.encoder.layer[1]

    class Lora(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        weight = property(lambda self: self.base.weight)
        bias = property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + x.mean()

    a.attention.self.query = Lora(a.attention.self.query)
    torch.nn.utils.parametrizations.weight_norm(a.output.dense)
    b.output.LayerNorm.forward = lambda x: x
    b.intermediate.adapter = torch.nn.Linear(2, 2)
    prune.l1_unstructured(b.attention.output.dense, "weight", 0.5)
    report = ft.swap(model)
    assert "Lora" in skipped_reason(report, "encoder.layer.0.attention.self")
    assert "Parametrized" in skipped_reason(report, "encoder.layer.0.output")
    assert "parametrized" in skipped_reason(report, "encoder.layer.0.output.dense")
    assert "replaced" in skipped_reason(report, "encoder.layer.1.output")
    assert "replaced" in skipped_reason(report, "encoder.layer.1.output.LayerNorm")
    assert "adapter" in skipped_reason(report, "encoder.layer.1.intermediate")
    assert "hook" in skipped_reason(report, "encoder.layer.1.attention.output")
    inputs = padded(2)
    ours = last(model, **inputs)
    ft.restore(model)
    assert torch.allclose(ours, last(model, **inputs), atol=1e-4)


def test_a_part_replaced_after_the_swap_is_called():
    """As adapters do it: the wrapper has a weight, which is not all that it computes."""
    model = small("bert")
    ft.swap(model)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.encoder.layer[0].output.dense
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.encoder.layer[0].output.dense = new
    inputs = padded()
    ours = last(model, **inputs)
    ft.restore(model)
    assert torch.allclose(ours, last(model, **inputs), atol=1e-4)


def test_unknown_subclasses_and_implementations():
    from transformers.models.bert.modeling_bert import BertSelfOutput

    class Mine(BertSelfOutput):
        pass

    model = small("bert")
    model.encoder.layer[0].attention.output.__class__ = Mine
    report = ft.swap(model)
    reason = skipped_reason(report, "encoder.layer.0.attention.output")
    assert reason == "a subclass of BertSelfOutput that is not known"
    ft.restore(model)

    def doubled(module, query, key, value, attention_mask, **kwargs):
        return 2 * value.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("doubled", doubled)
    model.set_attn_implementation("doubled")
    report = ft.swap(model)
    assert "'doubled'" in skipped_reason(report, "encoder.layer.0.attention.self")
    ft.restore(model)
    model.set_attn_implementation("sdpa")
    ft.swap(model)
    model.config._attn_implementation = "doubled"  # after the swap: the original runs
    inputs = {"input_ids": torch.randint(2, 60, (2, 5))}
    ours = last(model, **inputs)
    ft.restore(model)
    assert torch.allclose(ours, last(model, **inputs), atol=1e-4)


def test_a_hook_that_reads_attention_weights():
    model = small("bert", "eager")
    seen = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda m, a, o: seen.append(o[1]))
    report = ft.swap(model)
    assert "weights" in skipped_reason(report, "encoder.layer.0.attention.self")
    model.encoder.layer[1].attention.self.register_forward_hook(lambda m, a, o: seen.append(o[1]))
    last(model, **padded())
    assert all(weights.shape == (3, 4, 11, 11) for weights in seen)
