"""Models in folders, in other processes, under transformers' Trainer; the tutorial's program."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fasttransformer.models import (
    Decoder,
    Encoder,
    LanguageModel,
    Seq2SeqModel,
    SpanModel,
    TextClassifier,
    TextModel,
    Tokenizer,
    pretrained,
)

ROOT = Path(__file__).resolve().parent.parent
STACK = (300, 16, 32, 1, 4)
CALLS = {
    "Encoder": (lambda: Encoder(*STACK), lambda m: m(["a text", ""]).hidden),
    "Decoder": (
        lambda: Decoder(*STACK, cross_attention=False), lambda m: m(["a text", ""]).hidden,
    ),
    "Seq2SeqModel": (
        lambda: Seq2SeqModel(Encoder(*STACK, True, positions="rotary"),
                             Decoder(*STACK, True, positions="learned", label_smoothing=0.1)),
        lambda m: m(["a text", ""], ["b", "你好"]).logits,
    ),
    "shared": (
        lambda: Seq2SeqModel(Encoder(*STACK), Decoder(*STACK), share_embeddings=True),
        lambda m: m(["a text", ""], ["b", "你好"]).logits,
    ),
    "LanguageModel": (
        lambda: LanguageModel(*STACK, positions="alibi", activation="swiglu"),
        lambda m: m(["a text", ""]).logits,
    ),
    "TextClassifier": (
        lambda: TextClassifier(Encoder(*STACK), labels=["good", "bad", "so so"]),
        lambda m: m(["a text", ""]).logits,
    ),
    "SpanModel": (
        lambda: SpanModel(Encoder(*STACK)), lambda m: m(["q", "w"], ["context", ""]).logits,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_saved_model_comes_back(name, tmp_path):
    make, call = CALLS[name]
    model = make().eval()
    model.tokenizer = Tokenizer.train(["a text of some text", "context"] * 3, 280)
    model.save_pretrained(tmp_path / "new" / "model")
    names = {path.name for path in (tmp_path / "new" / "model").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    for cls in (type(model), TextModel):
        back = cls.from_pretrained(tmp_path / "new" / "model")
        assert type(back) is type(model) and not back.training
        assert back.configs() == model.configs() and back.tokenizer == model.tokenizer
        assert torch.equal(call(back), call(model))
        assert back.tied() == [] or all(a.weight is b.weight for a, b in back.tied())
    half = TextModel.from_pretrained(tmp_path / "new" / "model", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = TextModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(call(again), call(half))


def test_a_tied_weight_is_written_once(tmp_path):
    CALLS["shared"][0]().save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert [name for name, x in state.items() if x.shape == (300, 16)] == [
        "decoder.embedding.weight"
    ]
    assert not (tmp_path / "tokenizer.json").exists()
    back = Seq2SeqModel.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.encoder.embedding.weight is back.decoder.embedding.weight


def test_what_does_not_fit_is_an_error_that_names_both(tmp_path):
    model = CALLS["Seq2SeqModel"][0]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**changes):
        other = json.loads(json.dumps(config))
        for stack in other["configs"].values():
            stack.update(changes)
        (tmp_path / "config.json").write_text(json.dumps(other))
        return TextModel.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"vocabulary of 300, but its config makes it a .* 301"):
        changed(vocab_size=301)
    with pytest.raises(ValueError, match=r"shape \(32, 16\), but its config makes it shape"):
        changed(hidden_dim=33)
    with pytest.raises(ValueError, match=r"it lacks \['decoder.layers.1"):
        changed(num_layers=2)
    with pytest.raises(ValueError, match="colour is not an option"):
        changed(colour="red")
    with pytest.raises(ValueError, match="dropout is 2"):
        changed(dropout=2)
    assert type(changed()) is Seq2SeqModel
    with pytest.raises(ValueError, match=r"LanguageModel: .* holds a Seq2SeqModel"):
        LanguageModel.from_pretrained(tmp_path)
    Tokenizer.train(["ab cd " * 9, "ef gh " * 9, *map(str, range(999))], 310).save(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 310, but the model has one of 300"):
        TextModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a config of this package"):
        TextModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        TextModel.from_pretrained(tmp_path / "nowhere")


def test_a_crash_while_saving_leaves_the_old_files(tmp_path, monkeypatch):
    model = CALLS["LanguageModel"][0]().eval()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def broken_files(folder):
    """(what is broken, how, the message)"""
    weights, config = folder / "model.safetensors", folder / "config.json"
    state = safetensors.torch.load_file(weights)
    written = json.loads(config.read_text())

    def with_config(**changes):
        other = json.loads(json.dumps(written))
        other["configs"]["decoder"].update(changes)
        return lambda: config.write_text(json.dumps(other))

    def with_weights(change):
        def write():
            other = {name: change(weight) for name, weight in state.items()}
            weights.write_bytes(safetensors.torch.save(other))

        return write

    def tokenizer(change):
        def write():
            Tokenizer.default().save(folder)
            described = json.loads((folder / "tokenizer.json").read_text())
            change(described["model"]["vocab"])
            (folder / "tokenizer.json").write_text(json.dumps(described))

        return write

    header = b'{"__metadata__":{},"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'
    unknown = len(header).to_bytes(8, "little") + header + bytes(4)
    yield "bytes", lambda: weights.write_bytes(b"no weights"), "is not a safetensors file"
    yield "cut", lambda: weights.write_bytes(weights.read_bytes()[:-9]), "is not a safetensors file"
    yield "dtype", lambda: weights.write_bytes(unknown), "is not a safetensors file"
    yield "int", with_weights(lambda x: x.to(torch.int64)), "has dtype torch.int64; weights are of"
    yield "bool", with_weights(lambda x: x > 0), "has dtype torch.bool; weights are of"
    yield "deep", lambda: config.write_text("[" * 100_000), "is not a config of this package"
    yield "latin", lambda: config.write_bytes(b'{"class": "\xff"}'), "is not a config"
    yield "list", lambda: config.write_text('{"class": [], "configs": {}}'), "is not a config"
    parts = {"class": "Seq2SeqModel", "configs": {}}
    yield "parts", lambda: config.write_text(json.dumps(parts)), "is not a config of a Seq2SeqModel"
    yield "text", with_config(dropout="0.1"), "is not a config of a Seq2SeqModel"
    yield "layers", with_config(num_layers=10**7), "makes 10000001 layers, but .* weights in all"
    yield "vocabulary", with_config(vocab_size=10**13), "a vocabulary of 300, but its config makes"
    yield "features", with_config(hidden_dim=10**17), "config"
    yield "gap", tokenizer(lambda v: v.update({"zz": 277})), "none or several with the id 260"
    yield "twice", tokenizer(lambda v: v.update({"zz": 9})), "Tokenizer: "


BROKEN = ("bytes cut dtype int bool deep latin list parts text layers vocabulary features gap "
          "twice").split()  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_a_value_error_at_once(what, tmp_path):
    CALLS["Seq2SeqModel"][0]().save_pretrained(tmp_path)
    ((breaks, message),) = [(b, m) for name, b, m in broken_files(tmp_path) if name == what]
    TextModel.from_pretrained(tmp_path)
    breaks()
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        TextModel.from_pretrained(tmp_path)
    assert time.monotonic() - started < 20.0


# ---- transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2seq", "lm", "classifier"])
def test_trainer_trains(kind, tmp_path):
    """transformers' Trainer: batches by name, accumulation by tokens, evaluation, a checkpoint."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    class Rows(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            ids = torch.tensor([4 + i, 5 + i, 6, 2])
            mask = torch.ones(4, dtype=torch.long)
            labels = torch.tensor(i % 2) if kind == "classifier" else ids
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    torch.manual_seed(0)
    model = {
        "seq2seq": lambda: Seq2SeqModel(Encoder(*STACK), Decoder(*STACK)),
        "lm": lambda: LanguageModel(*STACK),
        "classifier": lambda: TextClassifier(Encoder(*STACK), 2),
    }[kind]()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=3e-3,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_steps=30, logging_steps=100,
        ),
        train_dataset=Rows(), eval_dataset=Rows(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predicted = trainer.predict(Rows()).predictions
    assert predicted.shape == ((12, 2) if kind == "classifier" else (12, 4, 300))
    (checkpoint,) = tmp_path.glob("checkpoint-30")
    assert any(path.suffix == ".safetensors" for path in checkpoint.iterdir())


def test_seq2seq_trainer_judges_what_is_generated(tmp_path):
    """transformers' Seq2SeqTrainer with predict_with_generate, and its own way to go on."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    torch.manual_seed(0)
    rows = []
    for i in range(16):
        ids = torch.tensor([4 + i % 4, 5, 2])
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})

    def exact(predicted):
        wanted = torch.tensor(predicted.label_ids)
        given = torch.tensor(predicted.predictions)
        assert given[:, 0].eq(1).all()  # the start token, as of every transformers' model
        given = given[:, 1 : 1 + wanted.shape[1]]
        return {"exact": float((given[:, :3] == wanted[:, :3]).all(1).float().mean())}

    def trainer(steps):
        model = Seq2SeqModel(Encoder(*STACK, dropout=0.0), Decoder(*STACK, dropout=0.0))
        return Seq2SeqTrainer(
            model,
            Seq2SeqTrainingArguments(
                str(tmp_path), max_steps=steps, per_device_train_batch_size=8, save_steps=40,
                learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
                predict_with_generate=True, generation_max_length=6, generation_num_beams=2,
            ),
            train_dataset=rows, eval_dataset=rows, compute_metrics=exact,
        )  # fmt: skip

    trainer(40).train()
    resumed = trainer(80)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 80
    assert resumed.evaluate()["eval_exact"] > 0.9
    assert resumed.evaluate(num_beams=1)["eval_exact"] > 0.9


def test_generate_by_transformers_names():
    from types import SimpleNamespace

    torch.manual_seed(0)
    model = Seq2SeqModel(Encoder(*STACK), Decoder(*STACK))
    ids = torch.tensor([[5, 6, 2, 0], [7, 8, 9, 2]])
    texts = model.generate(ids, max_new_tokens=5)
    for options in ({"max_new_tokens": 5}, {"max_length": 6},
                    {"generation_config": SimpleNamespace(max_length=6, top_k=50)}):  # fmt: skip
        found = model.generate(input_ids=ids, labels=ids, synced_gpus=False, **options)
        assert found.shape[0] == 2 and found[:, 0].tolist() == [1, 1]
        for row, text in zip(found[:, 1:].tolist(), texts):
            ended = text if len(text) == 5 else [*text, 2]
            assert row == ended + [0] * (len(row) - len(ended))
    config = SimpleNamespace(max_new_tokens=3, num_beams=2)
    one = model.generate(input_ids=ids, generation_config=config, max_new_tokens=1)
    assert one.shape == (2, 2)
    ours = LanguageModel(*STACK)
    assert torch.equal(ours.generate(input_ids=ids, max_length=6)[:, :4], ids)
    with pytest.raises(ValueError, match="generation_max_length"):
        model.generate(input_ids=ids)
    with pytest.raises(ValueError, match="max_length is 4; the decoder starts with 4"):
        ours.generate(input_ids=ids, max_length=4)
    with pytest.raises(ValueError, match="max_length and generation_config go with input_ids"):
        model.generate(ids, max_length=6)
    with pytest.raises(ValueError, match="max_new_tokens must be given"):
        model.generate(ids)


# ---- other processes ----------------------------------------------------------------------------


def test_importing_the_package_imports_none_of_its_text_libraries():
    code = (
        "import sys, fasttransformer\n"
        "found = {'tokenizers', 'safetensors', 'transformers', 'fasttransformer.models'} "
        "& sys.modules.keys()\n"
        "assert not found, found\n"
        "import fasttransformer.models\n"
        "found = {'tokenizers', 'safetensors', 'transformers'} & sys.modules.keys()\n"
        "assert not found, found\n"
        "sys.modules['tokenizers'] = sys.modules['safetensors'] = None\n"
        "from fasttransformer.models import LanguageModel\n"
        "model = LanguageModel(300, 16, 32, 1, 4)\n"
        "model([[5, 6]]).loss.backward()\n"
        "for call in (lambda: model(['text']), lambda: model.save_pretrained('/nowhere')):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        assert 'fasttransformer[text]' in str(error)\n"
        "    else:\n"
        "        raise AssertionError\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_fsdp_finds_the_outputs_tensors():
    """Its hooks hang on what pytree finds."""
    model = LanguageModel(*STACK)
    outputs = model([[5, 6, 7]])
    leaves, spec = torch.utils._pytree.tree_flatten(outputs)
    assert any(leaf is outputs.loss for leaf in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.loss is outputs.loss and torch.equal(again.logits, outputs.logits)


def test_the_tutorials_program(capsys):
    """examples/summarize_tutorial.py as it is; its scheduler leaves a learning rate of 0."""
    names = runpy.run_path(str(ROOT / "examples" / "summarize_tutorial.py"))
    assert names["outputs"].loss.item() == pytest.approx(10.9, abs=1.0)  # log 32000 = 10.4
    assert names["outputs"].logits.shape == (4, 22, 32000)
    assert names["scheduler"].get_last_lr() == [0.0]
    assert "loss " in capsys.readouterr().out
    assert pretrained.CONFIG_FILE == "config.json"
