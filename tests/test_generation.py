"""Generation against plain code that computes every step anew, without a cache."""

import math

import pytest
import torch

import fasttransformer as ft
from fasttransformer.models import Decoder, Encoder, LanguageModel, Seq2SeqModel
from fasttransformer.models import decoding as decoding_module
from fasttransformer.models.decoding import DecodingState
from fasttransformer.models.packing import pack

V, C, HIDDEN, HEADS = 40, 16, 32, 4
#: Tokens that end a text beside </s>: a random model then ends its texts at all lengths.
STOPS = tuple(range(4, 10))


def lively(model):
    """Weights so large that the model's choices differ from step to step and are never close."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                parameter.dim() == 2
            ):  # the output layer is not the embedding: it would repeat tokens
                scale = 0.5 if "embedding" in name else 0.4
                parameter.normal_(std=scale, generator=generator)
    return model.eval()


def seq2seq(pre_norm=False, positions="sinusoidal", vocab=V, **options):
    stack = (vocab, C, HIDDEN, 2, HEADS, pre_norm)
    options = {"positions": positions, "tie_embeddings": False, **options}
    return lively(Seq2SeqModel(Encoder(*stack, **options), Decoder(*stack, **options)))


def language_model(pre_norm=True, positions="rotary", vocab=V, **options):
    return lively(
        LanguageModel(
            vocab,
            C,
            HIDDEN,
            2,
            HEADS,
            pre_norm,
            positions=positions,
            tie_embeddings=False,
            **options,
        )
    )


def sources_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, V, (n,), generator=generator).tolist() for n in lengths]


# ---- the same without a cache -------------------------------------------------------------------


def log_probabilities(model, source, tokens):
    """log p of each token after `tokens`, by a forward pass over everything."""
    with torch.no_grad():
        if isinstance(model, Seq2SeqModel):
            memory = model.encoder(pack([source]))
            batch = pack([[1, *tokens]])
            hidden = model.decoder.run(batch, memory.hidden, memory.batch)
        else:
            hidden = model.decoder.run(pack([[*source, *tokens]]))
        return (hidden[-1].double() @ model.lm_head.weight.double().T).log_softmax(-1)


def greedy(model, source, max_new_tokens, stops):
    tokens, score = [], 0.0
    while len(tokens) < max_new_tokens:
        best = log_probabilities(model, source, tokens).max(0)
        score += best.values.item()
        if best.indices.item() in stops:
            break
        tokens.append(best.indices.item())
    return tokens, score


def beams(model, source, max_new_tokens, stops, k, penalty):
    live, ended = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        candidates = []
        for score, tokens in live:
            logs = log_probabilities(model, source, tokens)
            candidates += [(score + logs[i].item(), tokens, i) for i in range(len(logs))]
        candidates.sort(key=lambda c: -c[0])
        live = []
        for rank, (score, tokens, token) in enumerate(candidates[: 2 * k]):
            if token in stops:
                if rank < k:
                    ended.append((score / length**penalty, tokens))
            elif len(live) < k:
                live.append((score, [*tokens, token]))
        ended = sorted(ended, key=lambda e: -e[0])[:k]
        best = live[0][0] / (max_new_tokens if penalty > 0 else length) ** penalty
        if len(ended) == k and ended[-1][0] >= best:
            break
    else:
        ended += [(score / max_new_tokens**penalty, tokens) for score, tokens in live]
    score, tokens = max(ended, key=lambda e: e[0])
    return tokens, score


MODELS = {
    "seq2seq-post-sinusoidal": lambda: seq2seq(),
    "seq2seq-pre-learned": lambda: seq2seq(True, "learned", activation="swiglu"),
    "seq2seq-post-rotary": lambda: seq2seq(False, "rotary"),
    "seq2seq-pre-alibi": lambda: seq2seq(True, "alibi", activation="gelu"),
    "lm-pre-rotary": lambda: language_model(),
    "lm-post-alibi": lambda: language_model(False, "alibi"),
    "lm-pre-sinusoidal": lambda: language_model(True, "sinusoidal"),
    "lm-pre-learned": lambda: language_model(True, "learned"),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_without_a_cache(name):
    model, sources = MODELS[name](), sources_of(3, 7, 1, 5)
    texts, scores = model.generate(
        sources, max_new_tokens=12, stop_tokens=STOPS, return_scores=True
    )
    for source, text, score in zip(sources, texts, scores):
        tokens, wanted = greedy(model, source, 12, {2, *STOPS})
        assert text == tokens
        assert math.isclose(score, wanted, abs_tol=1e-4)
    assert len({len(text) for text in texts}) > 1  # or nothing was shown about endings


@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("name", ["seq2seq-post-sinusoidal", "lm-pre-rotary"])
def test_beams_are_those_without_a_cache(name, penalty):
    model, sources = MODELS[name](), sources_of(3, 7, 1, 5, seed=3)
    texts, scores = model.generate(
        sources, max_new_tokens=8, num_beams=3, length_penalty=penalty, stop_tokens=STOPS,
        return_scores=True,
    )  # fmt: skip
    for source, text, score in zip(sources, texts, scores):
        tokens, wanted = beams(model, source, 8, {2, *STOPS}, 3, penalty)
        assert text == tokens
        assert math.isclose(score, wanted, abs_tol=1e-4)


def test_beams_find_the_likeliest_text_when_there_are_enough():
    model, stops = seq2seq(vocab=8), {2, 4}
    (source,) = [[5, 6, 7]]
    best, texts = (-math.inf, None), [[]]
    for length in range(1, 4):
        following = []
        for tokens in texts:
            logs = [log_probabilities(model, source, tokens[:i]) for i in range(len(tokens) + 1)]
            score = sum(logs[i][token].item() for i, token in enumerate(tokens))
            for token in range(8):
                total = score + logs[-1][token].item()
                if token in stops or length == 3:
                    text = tokens if token in stops else [*tokens, token]
                    best = max(best, (total, text))
                if token not in stops:
                    following.append([*tokens, token])
        texts = following
    found = model.generate([source], max_new_tokens=3, num_beams=600, length_penalty=0.0,
                           stop_tokens=(4,))  # fmt: skip
    assert found == [best[1]]


# ---- b72, b74, b76 ------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "penalty": {"repetition_penalty": 1.3},
    "beam-penalty": {"num_beams": 2, "repetition_penalty": 1.3},
    "sample": {"do_sample": True, "seed": 5},
    "top_k": {"do_sample": True, "top_k": 5, "seed": 5},
    "top_p": {"do_sample": True, "top_p": 0.7, "temperature": 0.8, "seed": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [seq2seq, language_model], ids=["seq2seq", "lm"])
def test_a_text_does_not_depend_on_its_batch(kind, way):
    """b72: sorted or not, alone or among 30."""
    model = kind()
    lengths = torch.randint(1, 12, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    sources = sources_of(*lengths, seed=4)
    options = {"max_new_tokens": 6, "stop_tokens": STOPS, **WAYS[way]}
    together = model.generate(sources, **options)
    assert together == model.generate(sources, batch_size=7, **options)
    if not options.get("do_sample"):  # the draws belong to places in the list
        order = sorted(range(30), key=lambda i: len(sources[i]))
        assert [together[i] for i in order] == model.generate(
            [sources[i] for i in order], **options
        )
        assert [model.generate([s], **options)[0] for s in sources[:8]] == together[:8]
    assert len({len(text) for text in together}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_step_computes_one_token_and_equals_the_uncached_pass(name, monkeypatch):
    """b74, beyond the cache's first capacity."""
    model, sources = MODELS[name](), sources_of(3, 1, 6)
    steps = 40
    assert steps > decoding_module.FIRST_CAPACITY
    read = torch.randint(4, V, (3, steps), generator=torch.Generator().manual_seed(7))
    seen = []
    calls = decoding_module._Calls
    for owner, name in ((calls, "linear"), (calls, "linear_norm"), (calls, "attend"),
                        (decoding_module, "embedding")):  # fmt: skip
        function = getattr(owner, name)

        def counted(*args, _function=function, _first=owner is calls, **kwargs):
            seen.append(args[_first].shape[0])
            return _function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    with torch.no_grad():
        if isinstance(model, Seq2SeqModel):
            memory = model.encoder(sources)
            state = DecodingState(model.decoder, 3, memory=memory)
            batch = pack([[1, *row[:-1]] for row in read.tolist()])
            wanted = model.decoder.run(batch, memory.hidden, memory.batch)
        else:
            prompt = pack([source[:-1] for source in sources])
            state = DecodingState(model.decoder, 3, prompt=prompt)
            rows = [[*s, *row[:-1]] for s, row in zip(sources, read.tolist())]
            hidden = model.decoder.run(pack(rows)).split([len(row) for row in rows])
            wanted = torch.cat([h[len(s) - 1 :] for h, s in zip(hidden, sources)])
        seen.clear()
        start = [1] * 3 if isinstance(model, Seq2SeqModel) else [s[-1] for s in sources]
        ids = torch.cat([torch.tensor(start)[:, None], read[:, :-1]], 1)
        got = torch.stack([state.step(column) for column in ids.unbind(1)], 1)
    torch.testing.assert_close(got.flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)
    assert set(seen) == {3}  # one token of each text, in every operation


@pytest.mark.parametrize("name", ["seq2seq-pre-alibi", "lm-pre-rotary"])
def test_where_there_are_no_kernels_the_public_functions_run(name):
    model, sources = MODELS[name](), sources_of(3, 7, 1)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}):
        options = {"max_new_tokens": 5, "stop_tokens": STOPS, **options}
        wanted = model.generate(sources, **options)
        with ft.use_backend("torch"):
            assert model.generate(sources, **options) == wanted
        with torch.autocast("cpu", torch.bfloat16):
            assert len(model.generate(sources, **options)) == 3
        assert len(model.double().generate(sources, **options)) == 3
        model.float()


def test_padding_on_either_side_is_no_part_of_a_prompt():
    model = language_model()
    sources = sources_of(3, 5)
    texts = model.generate(sources, max_new_tokens=6)
    right = torch.tensor([sources[0] + [0, 0], sources[1]])
    left = torch.tensor([[0, 0] + sources[0], sources[1]])
    assert model.generate(right, max_new_tokens=6) == texts
    assert model.generate(left, attention_mask=left != 0, max_new_tokens=6) == texts


@pytest.mark.parametrize("batch_size", [1, 16, 1024])
def test_blank_lines_give_one_text_each_in_place(batch_size):
    """b76."""
    model = seq2seq(vocab=260)
    lines = [("" if i % 4 == 0 else " \t" if i % 9 == 0 else f"line {i}") for i in range(40)]
    texts = model.generate(lines, max_new_tokens=3, batch_size=batch_size)
    assert len(texts) == 40
    assert texts[1] == model.generate([lines[1]], max_new_tokens=3)[0]
    assert texts[-1] == model.generate(lines[-1], max_new_tokens=3)
    assert len(model.generate([""], max_new_tokens=3)) == 1
    assert model.generate([], max_new_tokens=3) == []


# ---- sampling -----------------------------------------------------------------------------------


def test_draws_follow_the_cut_distribution():
    model, count = seq2seq(), 4000
    (source,) = sources_of(4)
    logs = log_probabilities(model, source, [])
    p = (logs / 1.5).softmax(-1)
    falling, order = p.sort(descending=True)
    cases = {
        "all": ({}, torch.ones(V, dtype=torch.bool)),
        "top_k": ({"top_k": 6}, torch.arange(V) < 6),
        "top_p": ({"top_p": 0.6}, falling.cumsum(0) - falling < 0.6),
    }
    for options, kept in cases.values():
        wanted = torch.zeros(V, dtype=torch.float64)
        wanted[order] = torch.where(kept, falling, 0.0)
        wanted /= wanted.sum()
        texts = model.generate(
            [source] * count, max_new_tokens=1, do_sample=True, temperature=1.5, seed=0,
            batch_size=count, stop_tokens=(), **options,
        )  # fmt: skip
        drawn = torch.bincount(torch.tensor([t[0] if t else 2 for t in texts]), minlength=V)
        assert (drawn[wanted == 0] == 0).all()
        chi = ((drawn - count * wanted) ** 2 / (count * wanted))[wanted > 0].sum()
        assert chi < 2.0 * V  # its mean is one less than the number of tokens


def test_a_seed_gives_the_same_text_and_none_another():
    model, sources = seq2seq(), sources_of(4, 4)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    first = model.generate(sources, seed=1, **options)
    assert first == model.generate(sources, seed=1, **options)
    assert first != model.generate(sources, seed=2, **options)
    generator = torch.Generator().manual_seed(1)
    assert first == model.generate(sources, generator=generator, **options)
    assert first != model.generate(sources, generator=generator, **options)
    assert first[0] != model.generate([sources[0]] * 2, seed=1, **options)[1]


def test_the_repetition_penalty_is_ctrls():
    model, (source,) = language_model(), sources_of(5)
    tokens, penalty = list(source), 1.7
    for _ in range(8):
        logits = model.decoder.run(pack([tokens]))[-1] @ model.lm_head.weight.T
        for token in set(tokens):
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        tokens.append(logits.argmax().item())
    found = model.generate([source], max_new_tokens=8, repetition_penalty=penalty)
    assert found == [tokens[5:]]


# ---- streams, states, errors --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sample"])
@pytest.mark.parametrize("kind", [seq2seq, language_model], ids=["seq2seq", "lm"])
def test_a_stream_is_the_text_in_pieces(kind, options):
    model = kind(vocab=300)
    whole = model.generate("a source", max_new_tokens=30, **options)
    pieces = []
    for piece in model.train().stream("a source", max_new_tokens=30, **options):
        assert model.training and torch.is_grad_enabled()
        pieces.append(piece)
    assert "".join(pieces) == whole and len(pieces) > 3


def test_text_is_made_of_the_tokenizers_tokens():
    """The default tokenizer has 260 tokens, the model of the tutorial 32,000."""
    model = seq2seq(vocab=2000)
    texts = model.generate(["one", "two"], max_new_tokens=20)
    assert all(isinstance(text, str) for text in texts)
    ids = model.generate([[5, 6]], max_new_tokens=20)
    assert max(ids[0]) >= 260


def test_generation_leaves_the_model_as_it_was():
    model = seq2seq(dropout=0.5).train()
    sources = sources_of(3, 4)
    texts = model.generate(sources, max_new_tokens=5)
    assert model.training and texts == model.generate(sources, max_new_tokens=5)
    model(sources, sources).loss.backward()  # nothing of the cache is left in the graph
    with pytest.raises(ValueError):
        model.generate([[V]], max_new_tokens=5)
    assert model.training


def test_a_16_bit_model_generates():
    model = seq2seq().bfloat16()
    texts, scores = model.generate(sources_of(3, 5), max_new_tokens=5, num_beams=2,
                                   return_scores=True)  # fmt: skip
    assert len(texts) == 2 and all(score < 0 for score in scores)


def test_zero_tokens_and_one_source():
    model = seq2seq(vocab=260)
    for options in WAYS.values():
        assert model.generate(["a", "b"], max_new_tokens=0, **options) == ["", ""]
    text, score = model.generate("a", max_new_tokens=2, return_scores=True)
    assert isinstance(text, str) and score < 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "do_sample": True}, "excludes num_beams"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 33}, "exceed the learned positions, max_length 32"),
    ],
)
def test_bad_options(options, message):
    model = seq2seq(positions="learned", max_length=32)
    with pytest.raises(ValueError, match=message):
        model.generate([[5]], **{"max_new_tokens": 3, **options})


def test_a_prompt_must_have_a_token():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        language_model().generate([[5], []], max_new_tokens=3)
