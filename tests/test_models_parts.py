"""What happens to a model's parts: adapters, hooks, modes, weights that are NaN; and long texts."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fasttransformer.models import (
    Decoder,
    Encoder,
    LanguageModel,
    MiniLMClassifier,
    Seq2SeqModel,
    SpanModel,
    TextClassifier,
)
from fasttransformer.models.decoding import DecodingState, UncachedState, decoding_state
from fasttransformer.models.minilm_classifier import HeadConfig
from fasttransformer.models.modes import evaluating
from fasttransformer.models.tasks import task_of
from fasttransformer.nn import LMHead

V, C, HIDDEN, HEADS = 40, 16, 32, 4


def seq2seq(pre_norm=False, layers=1, vocab=V, **options):
    stack = (vocab, C, HIDDEN, layers, HEADS, pre_norm)
    options = {"dropout": 0.0, **options}
    return Seq2SeqModel(Encoder(*stack, **options), Decoder(*stack, **options))


def language_model(pre_norm=True, layers=1, vocab=V, **options):
    options = {"dropout": 0.0, "positions": "rotary", **options}
    return LanguageModel(vocab, C, HIDDEN, layers, HEADS, pre_norm, **options)


def classifier(**options):
    encoder = Encoder(V, C, HIDDEN, 1, HEADS, dropout=0.0, **options)
    return TextClassifier(encoder, labels=["a", "b", "c"])


SOURCES, TARGETS = [[5, 6, 7, 8], [9, 10]], [[11, 12, 2], [13, 14, 15, 2]]
KINDS = {
    "seq2seq-post": (lambda: seq2seq(tie_embeddings=False), (SOURCES, TARGETS)),
    "seq2seq-pre": (
        lambda: seq2seq(True, tie_embeddings=False, activation="swiglu"), (SOURCES, TARGETS)
    ),
    "lm": (lambda: language_model(tie_embeddings=False), (TARGETS,)),
    "classifier": (classifier, (SOURCES, [0, 2])),
    "minilm": (
        lambda: MiniLMClassifier(HeadConfig(["a", "b"], hidden_dim=8, dropout=0.0)),
        (torch.randn(3, 384, generator=torch.Generator().manual_seed(0)), [0, 1, 1]),
    ),
}  # fmt: skip
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "beams-penalty": {"num_beams": 2, "repetition_penalty": 1.3},
    "sample": {"do_sample": True, "seed": 5},
    "top_k": {"do_sample": True, "top_k": 5, "seed": 5},
    "top_p": {"do_sample": True, "top_p": 0.7, "seed": 5},
}


# ---- b107: adapters and hooks -------------------------------------------------------------------


class LoRA(nn.Module):
    """As peft wraps a linear layer, its weight within reach of whoever reads it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        rows, columns = base_layer.weight.shape
        self.lora_A = nn.Parameter(torch.randn(2, columns))
        self.lora_B = nn.Parameter(torch.randn(rows, 2) / columns**0.5)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T

    def merged(self):
        with torch.no_grad():
            self.base_layer.weight += self.lora_B @ self.lora_A
        return self.base_layer


def linear_parts(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def adapted(model, names):
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    return model


def merged(model):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            model.set_submodule(name, module.merged())
    return model


def texts_of(model, **options):
    return model.generate(SOURCES, max_new_tokens=4, stop_tokens=(30,), return_scores=True,
                          **options)  # fmt: skip


def assert_same_texts(ours, wanted):
    assert ours[0] == wanted[0]
    assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(ours[1], wanted[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_called_in_each_place(kind):
    make, texts = KINDS[kind]
    names = linear_parts(make())
    assert {name.rpartition(".")[2] for name in names} >= {
        "seq2seq": {"in_proj", "q_proj", "kv_proj", "out_proj", "linear1", "linear2", "lm_head"},
        "lm": {"in_proj", "out_proj", "linear1", "linear2", "lm_head"},
        "classifier": {"in_proj", "out_proj", "linear1", "linear2", "head"},
        "minilm": {"inner", "head"},
    }[kind.partition("-")[0]]
    for some in [*([name] for name in names), names]:
        model = adapted(make(), some).eval()
        loss = model(*texts).loss
        loss.backward()
        torch.testing.assert_close(loss, merged(model)(*texts).loss, atol=1e-4, rtol=1e-4)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    if hasattr(model, "generate"):
        plain = merged(model)
        for options in WAYS.values():
            assert_same_texts(texts_of(model, **options), texts_of(plain, **options))


def test_a_part_that_is_not_called_by_steps_is_called_all_the_same():
    """What is put around an attention, a block or a layer: a state without a cache."""

    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs) * 0.5

        def __getattr__(self, name):
            found = self._modules["inner"] if name == "inner" else None
            return found if found is not None else getattr(self._modules["inner"], name)

    for part in ("self_attn", "cross_attn", "feed_forward", "self_attn.rotary"):
        model = seq2seq(True, layers=2, positions="rotary").eval()
        assert type(decoding_state(model.decoder, 1)) is DecodingState
        before = model(SOURCES, TARGETS).loss
        layer = model.decoder.layers[1]
        if part == "self_attn.rotary":
            layer.self_attn.rotary.register_forward_hook(lambda m, x, y: (y[0] * 2.0, y[1]))
        else:
            setattr(layer, part, Halved(getattr(layer, part)))
        assert type(decoding_state(model.decoder, 1)) is UncachedState
        assert not torch.equal(model(SOURCES, TARGETS).loss, before)
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}):
            texts, _ = texts_of(model, **options)
            assert texts == [
                model.generate([source], max_new_tokens=4, stop_tokens=(30,), **options)[0]
                for source in SOURCES
            ] or options.get("do_sample")
        text = model.generate([SOURCES[0]], max_new_tokens=3, stop_tokens=(30,))[0]
        logits = model([SOURCES[0]], [[*text, 2]]).logits[0]
        assert logits.argmax(-1).tolist()[: len(text)] == text


@pytest.mark.parametrize("kind", ["seq2seq-post", "seq2seq-pre", "lm", "classifier"])
def test_a_hook_is_called_wherever_it_hangs(kind):
    make, texts = KINDS[kind]
    model = make().eval()
    wanted = model(*texts).loss
    generates = hasattr(model, "generate")
    before = texts_of(model) if generates else None
    for name, module in model.named_modules():
        if not name or isinstance(module, nn.ModuleList):
            continue
        calls = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.testing.assert_close(model(*texts).loss, wanted, atol=1e-5, rtol=1e-5)
        assert calls, name
        if generates:
            calls.clear()
            assert_same_texts(texts_of(model), before)
            assert calls, name
        handle.remove()
    called = set()
    handle = register_module_forward_hook(lambda module, *_: called.add(module))
    model(*texts)
    handle.remove()
    assert {m for m in model.modules() if not isinstance(m, nn.ModuleList)} == called


def test_a_hook_changes_what_comes_out():
    model = language_model(layers=2).eval()
    for part in ("self_attn.out_proj", "norm3", "feed_forward.linear1", "feed_forward"):
        module = model.decoder.layers[0].get_submodule(part)
        before = model(TARGETS).loss
        handle = module.register_forward_hook(lambda m, x, y: y * 0.25)
        assert not torch.allclose(model(TARGETS).loss, before, atol=1e-6), part
        text = model.generate([[5, 6]], max_new_tokens=4, stop_tokens=(30,))[0]
        logits = model([[5, 6, *text]]).logits[0]
        assert logits.argmax(-1).tolist()[1 : 1 + len(text)] == text
        handle.remove()


def test_an_adapter_on_a_tied_layer_leaves_it_tied():
    model = adapted(seq2seq(), ["lm_head"])
    shared = model.decoder.embedding.weight
    assert model.lm_head.base_layer.weight is shared
    copied = copy.deepcopy(model).bfloat16().to_empty(device="cpu")
    assert copied.lm_head.base_layer.weight is copied.decoder.embedding.weight
    state = model.state_dict()
    assert not [name for name in state if name.startswith("lm_head.base_layer")]
    other = adapted(seq2seq(), ["lm_head"])
    other.load_state_dict(state, assign=True)
    assert other.lm_head.base_layer.weight is other.decoder.embedding.weight
    other.lm_head.lora_A.requires_grad_()
    torch.testing.assert_close(other(SOURCES, TARGETS).loss, model(SOURCES, TARGETS).loss)


def test_a_parametrized_weight_is_read_as_it_is():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    model, twice = language_model(tie_embeddings=False).eval(), None
    twice = copy.deepcopy(model)
    for name in linear_parts(model):
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        with torch.no_grad():
            twice.get_submodule(name).weight *= 2.0
    torch.testing.assert_close(model(TARGETS).loss, twice(TARGETS).loss)
    assert_same_texts(texts_of(model), texts_of(twice))


def test_the_loss_of_a_head_says_how_to_flatten():
    head, hidden = LMHead(8, 20), torch.randn(2, 3, 8)
    target = torch.randint(20, (2, 3))
    with pytest.raises(
        ValueError, match=r"head.loss\(input.flatten\(0, -2\), target.flatten\(\)\)"
    ):
        head.loss(hidden, target)
    loss = head.loss(hidden.flatten(0, -2), target.flatten())
    wanted = nn.functional.cross_entropy(head(hidden).flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, wanted)


# ---- b109: modes --------------------------------------------------------------------------------


class Merging(nn.Module):
    """As loralib's layers are: its own ``train`` does more than set a flag."""

    def __init__(self):
        super().__init__()
        self.merged, self.dropout = False, nn.Dropout()

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def calls_that_evaluate():
    spans = SpanModel(Encoder(300, C, HIDDEN, 1, HEADS))
    text = {"vocab": 300, "dropout": 0.5}
    record = {"text": "some text"}
    yield "greedy", seq2seq(dropout=0.5), lambda m: m.generate(SOURCES, max_new_tokens=3)
    yield (
        "beams",
        seq2seq(dropout=0.5),
        lambda m: m.generate(SOURCES, max_new_tokens=3, num_beams=2),
    )
    yield "stream", seq2seq(**text), lambda m: list(m.stream("a", max_new_tokens=3))
    yield "predict", classifier(), lambda m: m.predict(SOURCES)
    yield "answer", spans, lambda m: m.answer(["q"], ["context"])
    yield "measured", language_model(**text), lambda m: task_of("generate").measured(m, [record])


@pytest.mark.parametrize("name", [name for name, _, _ in calls_that_evaluate()])
def test_every_part_is_in_its_own_mode_afterwards(name):
    ((model, call),) = [(model, call) for n, model, call in calls_that_evaluate() if n == name]
    model.more = Merging()
    stack = next(module for n, module in model.named_modules() if n.endswith("layers.0"))
    model.train()
    stack.eval()
    model.more.dropout.eval()
    before = {n: module.training for n, module in model.named_modules()}
    assert len(set(before.values())) == 2
    inside = []
    stack.register_forward_pre_hook(lambda module, args: inside.append(model.training))
    call(model)
    assert inside and not any(inside)
    assert {n: module.training for n, module in model.named_modules()} == before
    assert not model.more.merged  # train(True) by its own method
    model.eval()
    call(model)
    assert not any(module.training for module in model.modules()) and model.more.merged


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


# ---- b111: NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("make", [seq2seq, language_model], ids=["seq2seq", "lm"])
def test_nan_is_no_text(make, bad, way):
    model = make(vocab=300).eval()
    options = {"max_new_tokens": 3, **WAYS[way]}
    model.generate(SOURCES, **options)
    weight = model.decoder.layers[0].feed_forward.linear2.weight
    with torch.no_grad():
        weight[0, 0] = bad
        model.decoder.layers[0].feed_forward.linear1.bias[0] = 1e3  # relu passes it on
    for sources in (SOURCES, ["a", "b"]):
        with pytest.raises(ValueError, match="logits of source 0 hold NaN or infinity"):
            model.generate(sources, **options)
    if "num_beams" not in options:
        with pytest.raises(ValueError, match="logits of source 0 hold NaN"):
            list(model.stream("a", **options))


@pytest.mark.parametrize("way", WAYS)
def test_the_source_with_nan_is_named(way):
    model = seq2seq().eval()
    with torch.no_grad():
        model.encoder.embedding.weight[9] = math.nan  # of the second source alone
    with pytest.raises(ValueError, match="logits of source 1 hold NaN"):
        model.generate([SOURCES[0], SOURCES[1], SOURCES[0]], max_new_tokens=3, **WAYS[way])


def test_nan_is_no_class_and_no_answer():
    model, spans = classifier(), SpanModel(Encoder(300, C, HIDDEN, 1, HEADS))
    with torch.no_grad():
        model.encoder.embedding.weight[9] = math.nan
        spans.head.bias[1] = math.nan
    with pytest.raises(ValueError, match="predict: the logits of text 1 hold NaN"):
        model.predict(SOURCES)
    with pytest.raises(ValueError, match="answer: the logits of question 0 hold NaN"):
        spans.answer(["q"], ["context"])


# ---- b110: too long -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target", "predicted", "message"),
    [
        ("x" * 10, "y" * 11, 5, "1 of 1 prompts with their continuations have more than 16 tokens"),
        ("x" * 15, "y" * 5, 0, "1 have no room for any of it"),
        ("x" * 40, "y" * 4, 0, "1 have no room for any of it"),
        ([5] * 16, [6] * 3, 0, "1 have no room for any of it"),
        ([5] * 14, [6] * 2 + [2], 2, "more than 16 tokens"),
        ("x" * 10, "y" * 4, 5, None),
    ],
    ids=["cut", "full", "longer", "ids", "ids-end", "fits"],
)
@pytest.mark.filterwarnings("ignore:Tokenizer")
def test_a_continuation_beyond_the_length_is_told(prompt, target, predicted, message, recwarn):
    model = language_model(vocab=300, max_length=16)
    outputs = model([prompt], [target])
    assert outputs.num_tokens == predicted
    said = [str(w.message) for w in recwarn.list if "LanguageModel" in str(w.message)]
    assert len(said) == (message is not None) and all(message in text for text in said)
    if predicted and not isinstance(target, list):
        # The end token is predicted, as of a single text that is cut.
        ids = model.tokenizer.encode(prompt, bos=True)
        kept = model.tokenizer.encode(target)[: predicted - 1]
        alone = model([[*ids, *kept, 2]]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        wanted = -alone.gather(1, torch.tensor([*kept, 2])[:, None]).mean()
        torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=1e-5)


def test_a_context_beyond_the_length_is_told():
    model = SpanModel(Encoder(300, C, HIDDEN, 1, HEADS, max_length=16))
    with pytest.warns(UserWarning, match="SpanModel: 1 of 2 questions .* more than 16 tokens"):
        model(["q", "q"], ["c" * 30, "c"])
