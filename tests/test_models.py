"""The models against torch's own Transformer, and what they promise about padding and losses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft
from fasttransformer.models import (
    Decoder,
    Encoder,
    LanguageModel,
    Seq2SeqModel,
    SpanModel,
    TextClassifier,
    TextModel,
    Tokenizer,
    TransformerConfig,
    layers,
)
from fasttransformer.nn import linear as linear_module
from fasttransformer.nn import lm_head

V, C, HIDDEN, HEADS = 60, 16, 40, 4


def seq2seq(pre_norm=False, layers=2, **options):
    options = {"dropout": 0.0, **options}
    return Seq2SeqModel(
        Encoder(V, C, HIDDEN, layers, HEADS, pre_norm, **options),
        Decoder(V, C, HIDDEN, layers, HEADS, pre_norm, **options),
    )


def ids_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, V, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, value=0):
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, value)


# ---- against torch ------------------------------------------------------------------------------


def torchs_layer(ours, decoder):
    """torch's layer with our layer's weights."""
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(C, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=ours.pre_norm)
    ff = ours.feed_forward
    state = {
        "self_attn.in_proj_weight": ours.self_attn.in_proj.weight,
        "self_attn.in_proj_bias": ours.self_attn.in_proj.bias,
        "self_attn.out_proj.weight": ours.self_attn.out_proj.weight,
        "self_attn.out_proj.bias": ours.self_attn.out_proj.bias,
        "linear1.weight": ff.linear1.weight, "linear1.bias": ff.linear1.bias,
        "linear2.weight": ff.linear2.weight, "linear2.bias": ff.linear2.bias,
    }  # fmt: skip
    norms = [ours.norm1, ours.norm2, ours.norm3] if decoder else [ours.norm1, ours.norm3]
    for i, norm in enumerate(norms, 1):
        state |= {f"norm{i}.weight": norm.weight, f"norm{i}.bias": norm.bias}
    if decoder:
        cross = ours.cross_attn
        state["multihead_attn.in_proj_weight"] = torch.cat(
            [cross.q_proj.weight, cross.kv_proj.weight]
        )
        state["multihead_attn.in_proj_bias"] = torch.cat([cross.q_proj.bias, cross.kv_proj.bias])
        state["multihead_attn.out_proj.weight"] = cross.out_proj.weight
        state["multihead_attn.out_proj.bias"] = cross.out_proj.bias
    layer.load_state_dict(state)
    return layer


class Torchs(nn.Module):
    """The same model from torch's modules, padded, with the logits stored."""

    def __init__(self, ours):
        super().__init__()
        self.config = ours.config
        self.embedding = [nn.Embedding(V, C, 0), nn.Embedding(V, C, 0)]
        for theirs, stack in zip(self.embedding, (ours.encoder, ours.decoder)):
            theirs.weight = nn.Parameter(stack.embedding.weight.detach().clone())
        self.embedding = nn.ModuleList(self.embedding)
        self.encoder = nn.ModuleList(torchs_layer(x, False) for x in ours.encoder.layers)
        self.decoder = nn.ModuleList(torchs_layer(x, True) for x in ours.decoder.layers)
        self.norms = nn.ModuleList(
            nn.LayerNorm(C) if self.config.pre_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, source, target):
        end = source == 0
        x = self.embed(0, source)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=end)
        memory = self.norms[0](x)
        shifted = target.roll(1, 1)
        shifted[:, 0] = 1
        x = self.embed(1, shifted)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=end)
        return self.norms[1](x) @ self.embedding[1].weight.T

    def embed(self, which, ids):
        position = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        frequency = 10000.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        angle = position * frequency
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(torch.get_default_dtype())
        return self.embedding[which](ids) * C**0.5 + table


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_loss_logits_and_gradients_are_those_of_torchs_modules(pre_norm):
    ours = seq2seq(pre_norm, activation="relu")
    theirs = Torchs(ours)
    sources, targets = ids_of(5, 1, 7), ids_of(3, 6, 2, seed=1)
    logits = theirs(padded(sources), padded(targets))
    labels = padded(targets, -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    outputs = ours(sources, targets)
    torch.testing.assert_close(outputs.loss, loss, atol=1e-5, rtol=1e-5)
    real = labels != -100
    torch.testing.assert_close(outputs.logits[real], logits[real], atol=1e-4, rtol=1e-4)
    assert (outputs.logits[~real] == 0).all()
    loss.backward()
    outputs.loss.backward()
    pairs = [(ours.decoder.embedding.weight, theirs.embedding[1].weight),
             (ours.encoder.embedding.weight, theirs.embedding[0].weight)]  # fmt: skip
    for a, b in ((ours.encoder.layers, theirs.encoder), (ours.decoder.layers, theirs.decoder)):
        for x, y in zip(a, b):
            pairs.append((x.self_attn.in_proj.weight, y.self_attn.in_proj_weight))
            pairs.append((x.feed_forward.linear2.bias, y.linear2.bias))
            pairs.append((x.norm1.weight, y.norm1.weight))
    for x, y in pairs:
        torch.testing.assert_close(x.grad, y.grad, atol=2e-5, rtol=1e-4)


# ---- padding ------------------------------------------------------------------------------------


def counted_rows(monkeypatch):
    """Rows that enter each linear layer and each attention of the stacks."""
    rows = {"linear": [], "attention": []}
    linear, attention = linear_module.linear_add, layers.attention_varlen

    def counted_linear(x, *args, **kwargs):
        rows["linear"].append(x.shape[0])
        return linear(x, *args, **kwargs)

    def counted_attention(query, key, *args, **kwargs):
        rows["attention"].append((query.shape[0], key.shape[0]))
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(linear_module, "linear_add", counted_linear)
    monkeypatch.setattr(layers, "attention_varlen", counted_attention)
    return rows


def test_nothing_is_computed_on_padding(monkeypatch):
    """A batch that is 90 % padding: every operation sees the real tokens, 10 %, alone."""
    model, rows = seq2seq(), counted_rows(monkeypatch)
    lengths = [60] + [1] * 11
    sources, targets = padded(ids_of(*lengths)), padded(ids_of(*lengths, seed=1))
    assert (sources == 0).float().mean() > 0.9
    outputs = model(sources, targets)
    real = sum(lengths)
    assert set(rows["linear"]) == {real} and set(rows["attention"]) == {(real, real)}
    assert outputs.hidden.shape == (real, C) and outputs.num_tokens == real
    outputs.loss.backward()


def test_padding_is_never_felt():
    """b67 and its kind: whatever stands behind a text's end, and however padding is told."""
    model = seq2seq().eval()
    sources, targets = ids_of(5, 2, 7), ids_of(3, 6, 1, seed=1)
    wanted = model(sources, targets)
    source, target = padded(sources), padded(targets)
    assert torch.equal(model(source, target).hidden, wanted.hidden)
    noise = torch.where(source == 0, 9, source)
    lengths = torch.tensor([5, 2, 7])
    assert torch.equal(model(noise, target, source_lengths=lengths).hidden, wanted.hidden)
    told = model(input_ids=noise, attention_mask=source != 0, labels=padded(targets, -100))
    assert torch.equal(told.hidden, wanted.hidden) and torch.equal(told.loss, wanted.loss)
    left = torch.zeros(3, 9, dtype=torch.long)
    for row, ids in zip(left, sources):
        row[-len(ids) :] = torch.tensor(ids)
    told = model(input_ids=left, attention_mask=left != 0, labels=padded(targets, -100))
    assert torch.equal(told.hidden, wanted.hidden)
    alone = [model([s], [t]).hidden for s, t in zip(sources, targets)]
    torch.testing.assert_close(torch.cat(alone), wanted.hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "alibi"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_order_and_the_future(positions, pre_norm):
    """Positions are told apart, and no token feels a later one."""
    model = seq2seq(pre_norm, positions=positions, activation="geglu").eval()
    source, target = [[5, 6, 7, 8]], [[10, 11, 12, 13]]
    hidden = model(source, target).hidden
    changed = model(source, [[10, 11, 30, 31]]).hidden
    assert torch.equal(changed[:3], hidden[:3]) and not torch.equal(changed[3], hidden[3])
    assert not torch.allclose(model([[6, 5, 7, 8]], target).hidden, hidden, atol=1e-4)
    swapped = model(source, [[11, 10, 12, 13]]).hidden
    assert not torch.allclose(swapped[3], hidden[3], atol=1e-4)


def test_texts_without_tokens():
    model = seq2seq()
    outputs = model([[], [5, 6], []], [[7], [], []])
    assert outputs.num_tokens == 1 and outputs.logits.shape == (3, 1, V)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    nothing = model([[], [5]], [[], []])
    assert nothing.loss.item() == 0.0 and nothing.num_tokens == 0
    nothing.loss.backward()


# ---- losses -------------------------------------------------------------------------------------


def grads_of(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
def test_accumulated_gradients_are_those_of_one_batch(kind):
    """b71: targets of 11 and 101 tokens, in one batch and one by one."""
    if kind == "lm":
        model = LanguageModel(V, C, HIDDEN, 2, HEADS, dropout=0.0)
        batches = [(x,) for x in ids_of(12, 102)]
    else:
        model = seq2seq()
        batches = list(zip(ids_of(5, 9), ids_of(11, 101, seed=1)))
    whole = model(*(list(part) for part in zip(*batches)))
    whole.loss.backward()
    wanted, total = grads_of(model), whole.num_tokens
    assert total == 112
    for way in ("loss_sum", "num_items_in_batch"):
        model.zero_grad()
        for batch in batches:
            texts = [[part] for part in batch]
            if way == "loss_sum":
                (model(*texts).loss_sum / total).backward()
            else:
                model(*texts, num_items_in_batch=total).loss.backward()
        for name, grad in grads_of(model).items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_the_loss_reads_labels_as_transformers_does():
    model = seq2seq().eval()
    sources, targets = padded(ids_of(5, 2)), ids_of(4, 6, seed=1)
    labels = padded(targets, -100)
    labels[1, 2] = -100  # in between: not predicted, but there
    outputs = model(input_ids=sources, labels=labels)
    assert outputs.num_tokens == 9
    logits, real = outputs.logits, labels != -100
    wanted = F.cross_entropy(logits[real], labels[real])
    torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=1e-5)
    assert outputs["loss"] is outputs[0] is outputs.loss and outputs[1:] == (outputs.logits,)
    assert len(outputs) == 2 and list(outputs.keys()) == ["loss", "logits"]


def test_logits_are_computed_when_asked_for(monkeypatch):
    model = seq2seq(label_smoothing=0.1).train()
    calls = []
    monkeypatch.setattr(lm_head, "linear_add", lambda x, *_: calls.append(1) or x)
    outputs = model(["one"] if V >= 260 else [[5, 6]], [[7]])
    outputs.loss.backward()
    assert not calls
    assert outputs.logits is outputs.logits and calls == [1]


def test_label_smoothing_is_for_training():
    model = seq2seq(label_smoothing=0.3)
    sources, targets = ids_of(4), ids_of(5, seed=1)
    trained, evaluated = model.train()(sources, targets), model.eval()(sources, targets)
    labels = torch.tensor(targets[0])
    for outputs, smoothing in ((trained, 0.3), (evaluated, 0.0)):
        wanted = F.cross_entropy(outputs.logits[0], labels, label_smoothing=smoothing)
        torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=1e-5)


def test_a_language_model_predicts_what_follows():
    model = LanguageModel(V, C, HIDDEN, 2, HEADS, dropout=0.0).eval()
    rows = ids_of(6, 3)
    outputs = model(rows)
    logits = outputs.logits
    losses = [F.cross_entropy(logits[i, : len(r) - 1], torch.tensor(r[1:]), reduction="sum")
              for i, r in enumerate(rows)]  # fmt: skip
    torch.testing.assert_close(outputs.loss, sum(losses) / 7, atol=1e-5, rtol=1e-5)
    ids, labels = padded(rows), padded(rows, -100)
    assert torch.equal(model(input_ids=ids, labels=labels).loss, outputs.loss)
    labels[0, :4] = -100  # a prompt
    answer = model(input_ids=ids, labels=labels)
    assert answer.num_tokens == 4
    continued = model([rows[0][:4]], [rows[0][4:]])
    alone = model(input_ids=ids[:1], labels=labels[:1])
    torch.testing.assert_close(continued.loss, alone.loss, atol=1e-6, rtol=1e-6)


# ---- parameters ---------------------------------------------------------------------------------


def build_tied(kind):
    if kind == "lm":
        return LanguageModel(V, C, HIDDEN, 1, HEADS, dropout=0.0)
    return seq2seq(layers=1, share_embeddings=True)


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
def test_tied_weights_stay_one_parameter(kind):
    """b66: through the meta device, assigned state dicts, copies and dtypes."""

    def tied(model):
        owner = model.decoder.embedding.weight
        assert model.lm_head.weight is owner
        assert kind == "lm" or model.encoder.embedding.weight is owner
        assert sum(p is owner for p in model.parameters()) == 1
        return model

    model = tied(build_tied(kind))
    state = model.state_dict()
    with torch.device("meta"):
        meta = build_tied(kind)
    meta = tied(tied(meta).to_empty(device="cpu"))
    meta.load_state_dict(state, assign=True)
    tied(tied(copy.deepcopy(meta)).double())
    texts = (ids_of(5), ids_of(4, seed=1))[: 1 if kind == "lm" else 2]
    assert torch.equal(meta.eval()(*texts).loss, model.eval()(*texts).loss)
    outputs = meta(*texts)
    outputs.loss.backward()
    grad = meta.lm_head.weight.grad
    assert grad is meta.decoder.embedding.weight.grad and grad[20:30].abs().sum() > 0
    before = meta.lm_head.weight.detach().clone()
    torch.optim.SGD(meta.parameters(), 0.1).step()
    assert not torch.equal(before, meta.decoder.embedding.weight)
    tied(meta)


def test_the_pad_row_is_trained_by_the_output_layer_alone():
    """b61: a look-up of the pad token gives its row no gradient."""
    model = seq2seq(tie_embeddings=False)
    assert (model.decoder.embedding.weight[0] == 0).all()
    model([[0, 5]], [[6, 0, 7]]).loss.backward()
    for stack in (model.encoder, model.decoder):
        assert (stack.embedding.weight.grad[0] == 0).all()
    tied = seq2seq()
    tied([[5]], [[6, 7]]).loss.backward()
    assert tied.decoder.embedding.weight.grad[0].abs().sum() > 0


def test_weights_start_as_the_docs_say():
    model = Seq2SeqModel(Encoder(V, 64, 128, 3, 4, True), Decoder(V, 64, 128, 3, 4, True))
    assert abs(model.decoder.embedding.weight[1:].std().item() * 8 - 1) < 0.1
    alone = LanguageModel(V, 64, 128, 3, 4)
    post = Seq2SeqModel(Encoder(V, 64, 128, 3, 4), Decoder(V, 64, 128, 3, 4))
    for stack in (model.encoder, model.decoder, alone.decoder, post.encoder, post.decoder):
        layer, cross = stack.layers[0], stack.layers[0].cross_attn
        places = {layer.self_attn.in_proj: 4 * 64, layer.self_attn.out_proj: 2 * 64,
                  layer.feed_forward.linear1: 192, layer.feed_forward.linear2: 192}  # fmt: skip
        if cross is not None:
            places |= {cross.q_proj: 4 * 64, cross.kv_proj: 4 * 64, cross.out_proj: 2 * 64}
        for linear, features in places.items():
            bound = (6 / features) ** 0.5
            assert 0.98 * bound < linear.weight.abs().max().item() <= bound
    for one in (model, post):
        logits = one.eval()(ids_of(*[9] * 9), ids_of(*[9] * 9, seed=1)).logits
        assert 0.7 < logits[:, :8].std().item() < 1.3
    assert all((p == 0).all() for n, p in model.named_parameters()
               if n.endswith("bias"))  # fmt: skip
    first = [m.self_attn.in_proj.weight for m in model.encoder.layers]
    assert not torch.equal(first[0], first[1])  # layers don't start equal


# ---- training and evaluation --------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_dropout_is_for_training(pre_norm):
    """b29."""
    model = seq2seq(pre_norm, dropout=0.5)
    plain = seq2seq(pre_norm)
    plain.load_state_dict(model.state_dict())
    texts = ids_of(6, 3), ids_of(5, 4, seed=1)
    assert torch.equal(model.eval()(*texts).loss, plain.train()(*texts).loss)
    assert not torch.equal(model.train()(*texts).loss, plain(*texts).loss)
    torch.manual_seed(3)
    first = model(*texts).loss
    torch.manual_seed(3)
    assert torch.equal(first, model(*texts).loss)


def test_it_learns():
    torch.manual_seed(0)
    model = seq2seq(positions="rotary", pre_norm=True, activation="swiglu")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sources = ids_of(*[5] * 16)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(sources, [s[::-1] for s in sources]).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    texts = model.generate(sources, max_new_tokens=5)
    assert texts == [s[::-1] for s in sources]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast(train):
    model = seq2seq(dropout=0.1 if train else 0.0).train(train)
    texts = ids_of(6, 3), ids_of(5, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*texts)
        assert model.generate(texts[0], max_new_tokens=3)
    assert outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in model.parameters())  # fmt: skip
    if not train:
        wanted = model(*texts).loss
        assert abs(outputs.loss.item() - wanted.item()) < 0.05


def test_strings_and_ids_are_the_same():
    encoder, decoder = Encoder(300, C, HIDDEN, 1, HEADS), Decoder(300, C, HIDDEN, 1, HEADS)
    model = Seq2SeqModel(encoder, decoder, 300, C, HIDDEN, 2).eval()
    encode = model.tokenizer.encode
    sources, targets = ["hello", "", "你好"], ["a", "bc", ""]
    ids = [encode(sources, eos=True), encode(targets, eos=True)]
    wanted = model(*ids)
    assert torch.equal(model(sources, targets).hidden, wanted.hidden)
    assert wanted.num_tokens == 6
    memory = encoder(sources)
    hidden = decoder(targets, memory).hidden
    assert torch.equal(hidden, wanted.hidden)
    assert memory.padded().shape == (3, 7, C) and memory.lengths == [6, 1, 7]


def test_long_texts_are_cut_with_a_warning():
    model = Seq2SeqModel(
        Encoder(260, C, HIDDEN, 1, HEADS, max_length=8, positions="learned"),
        Decoder(260, C, HIDDEN, 1, HEADS, max_length=8, positions="learned"),
    )
    with pytest.warns(UserWarning, match="more than 8 tokens"):
        outputs = model(["x" * 1000], ["y" * 1000])
    assert outputs.num_tokens == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(["x" * 7], ["y" * 7])
    with pytest.raises(ValueError, match="position"):
        model([[5] * 9], [[5]])


# ---- heads of an encoder ------------------------------------------------------------------------


def test_a_classifier_is_the_mean_through_a_linear_layer():
    model = TextClassifier(Encoder(V, C, HIDDEN, 2, HEADS, dropout=0.0), labels=["a", "b", "c"])
    rows = ids_of(5, 1, 8)
    outputs = model(rows, ["a", "c", "b"])
    hidden = model.encoder(rows).padded()
    means = torch.stack([h[: len(r)].mean(0) for h, r in zip(hidden, rows)])
    logits = F.linear(means, model.head.weight, model.head.bias)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    wanted = F.cross_entropy(logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=1e-5)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    ids = padded(rows)
    told = model(input_ids=ids, attention_mask=ids != 0, labels=torch.tensor([0, 2, 1]))
    assert torch.equal(told.loss, outputs.loss)
    p = logits.softmax(-1)
    for (label, probability), row in zip(model.predict(rows, batch_size=2), p):
        assert label == "abc"[row.argmax()] and abs(probability - row.max().item()) < 1e-5
    assert model([[]]).logits.isfinite().all()
    for target, message in ((["d"], "'d' is none of the labels, a, b, c"), ([0, 1], "shape")):
        with pytest.raises(ValueError, match=message):
            model([[5]], target)


def test_a_span_model_points_into_the_context():
    torch.manual_seed(0)
    model = SpanModel(Encoder(300, 32, 64, 2, 4, True, dropout=0.0))
    questions = ["who?", "what?", "where?", "who?"]
    contexts = ["Ada wrote code", "Bob ate 饺子 here", "Eve lives in Rome", "nobody is told"]
    answers = ["Ada", "饺子", "Rome", None]
    spans = [None if a is None else (c.index(a), c.index(a) + len(a))
             for a, c in zip(answers, contexts)]  # fmt: skip
    logits = model(questions, contexts, spans).logits
    assert logits.shape[2] == 2 and (logits[0, :5] == -torch.inf).all()  # who?<sep>
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(questions, contexts, spans).loss
        loss.backward()
        optimizer.step()
    found = model.eval().answer(questions, contexts, batch_size=3)
    assert [text for text, _ in found] == [a or "" for a in answers]
    assert all(probability > 0.5 for _, probability in found)
    for span in ((3, 3), (-1, 2), (0, 99)):
        with pytest.raises(ValueError, match="is not within its context"):
            model(["q"], ["context"], [span])
    with pytest.raises(ValueError, match="2 questions, but 1 contexts"):
        model(["a", "b"], ["c"])


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m([], []), "source is an empty batch"),
        (lambda m: m(torch.zeros(0, 3, dtype=torch.long), [[5]]), "source is an empty batch"),
        (lambda m: m([[5]], [[6], [7]]), "source has 1 texts, but target has 2"),
        (lambda m: m([[V]], [[6]]), f"input holds {V}; it must be in"),
        (lambda m: m([[-1]], [[6]]), "input holds -1"),
        (lambda m: m([[5]], [[V]]), f"holds {V}; it must be in"),
        (lambda m: m(["text"], ["text"]), "vocabulary of 60 is too small for text"),
        (lambda m: m([[5]]), "source and target must be given"),
        (lambda m: m(torch.ones(2, 3, 4, dtype=torch.long), [[5], [6]]), r"shape \(2, 3, 4\)"),
        (lambda m: m(input_ids=torch.ones(1, 3, dtype=torch.long), labels=[[5]],
                     attention_mask=torch.ones(1, 4)), r"attention_mask has shape \(1, 4\)"),
        (lambda m: m(torch.ones(1, 3, dtype=torch.long), [[5]], source_lengths=[4]), "go from 4"),
        (lambda m: m.decoder([[5], [6]], m.encoder([[5]])), "2 texts, but memory has 1"),
        (lambda m: m.decoder([[5]]), "memory is missing"),
        (lambda m: setattr(m, "tokenizer", Tokenizer.default()), "vocabulary of 260, but .* 60"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(seq2seq(layers=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer, 1 or more"),
        ({"embed_dim": 30}, "embed_dim is 30; it must be a multiple of num_heads, 8"),
        ({"embed_dim": 24, "positions": "rotary"}, "even multiple"),
        ({"positions": "none"}, "positions is 'none'; it must be one of sinusoidal"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"labels": ["a"]}, "2 names, one for each"),
        ({"pad_id": 260}, "pad_id is 260; it must be less than vocab_size, 260"),
        ({"pre_norm": "no"}, "pre_norm is 'no'"),
        ({"num_layers": True}, "num_layers is True"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"vocab_size": 260, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((61, C, HIDDEN, 4), "tgt_vocab is 61, but tgt_decoder has 60"),
        ((V, 32, HIDDEN, 4), "embed is 32, but tgt_decoder has 16"),
        ((V, C, 41, 4), "hidden is 41, but tgt_decoder has 40"),
        ((V, C, HIDDEN, 3), "num_layers is 3, but src_encoder has 2 layers and tgt_decoder 2"),
    ],
)
def test_sizes_that_do_not_fit_the_stacks(arguments, message):
    stack = (V, C, HIDDEN, 2, HEADS)
    with pytest.raises(ValueError, match=message):
        Seq2SeqModel(Encoder(*stack), Decoder(*stack), *arguments)
    Seq2SeqModel(Encoder(*stack), Decoder(*stack), V, C, HIDDEN, 4)
    with pytest.raises(ValueError, match="src_encoder has embed 32"):
        Seq2SeqModel(Encoder(V, 32, HIDDEN, 2, HEADS), Decoder(*stack))
    with pytest.raises(ValueError, match="share_embeddings needs one vocabulary"):
        Seq2SeqModel(Encoder(70, *stack[1:]), Decoder(*stack), share_embeddings=True)
    with pytest.raises(ValueError, match="has no cross-attention"):
        Seq2SeqModel(Encoder(*stack), Decoder(*stack, cross_attention=False))


def test_the_base_class_and_the_public_names():
    assert issubclass(Seq2SeqModel, TextModel) and not hasattr(ft, "Seq2SeqModel")
