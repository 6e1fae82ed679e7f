"""Options of transformers' Trainer with these models: they work, or an error names them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fasttransformer.models import (
    Decoder,
    Encoder,
    LanguageModel,
    MiniLMClassifier,
    Seq2SeqModel,
    SpanModel,
    TextClassifier,
)
from fasttransformer.models.minilm_classifier import HeadConfig

STACK = (40, 16, 32, 2, 4)


def model_of(kind, **options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, **options}
    if kind == "lm":
        return LanguageModel(*STACK, **options)
    encoder = Encoder(*STACK, **options)
    return Seq2SeqModel(encoder, Decoder(*STACK, **options)) if kind == "seq2seq" else (
        TextClassifier(encoder, 3)
    )  # fmt: skip


def rows_of(kind, model, decoder_ids=False):
    """Four rows whose targets have 1 to 4 tokens."""
    rows = []
    for i in range(4):
        ids = torch.tensor([5 + i, 6 + i, 7 + i, 8 + i, 2])
        labels = torch.tensor(i % 3)
        if kind != "classifier":
            labels = ids.roll(1) if kind == "seq2seq" else ids.clone()
            labels[i + 1 :] = -100
        row = {"input_ids": ids, "attention_mask": torch.ones(5, dtype=torch.long),
               "labels": labels}  # fmt: skip
        if decoder_ids:
            shifted = model.prepare_decoder_input_ids_from_labels(labels[None])
            row["decoder_input_ids"] = shifted[0]
        rows.append(row)
    return rows


def trainer_of(model, rows, folder, loss=None, **options):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        **{"max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd", "max_grad_norm": 0.0,
           "learning_rate": 0.1, "lr_scheduler_type": "constant", **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)


def stepped(model, loss):
    """A copy of the model after a step of SGD on ``loss(copy)``."""
    model = copy.deepcopy(model).train()
    loss(model).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model


def assert_same_weights(model, wanted):
    for (name, weight), other in zip(model.state_dict().items(), wanted.state_dict().values()):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4, msg=name)


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
def test_accumulation_weighs_every_token_alike(kind, tmp_path):
    """Not a mean of the batches' means: the Trainer gives the number of all tokens."""
    model = model_of(kind)
    rows = rows_of(kind, model)
    wanted = stepped(model, lambda m: m(**batch_of(rows)).loss)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer_of(model, rows, tmp_path, **options).train()
    assert_same_weights(model, wanted)


@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_label_smoothing_of_the_trainer(kind, tmp_path):
    model = model_of(kind)
    rows = rows_of(kind, model, decoder_ids=kind == "seq2seq")

    def smoothed(m):
        batch = batch_of(rows)
        labels = batch.pop("labels")
        logits = m(**batch, **({} if kind == "classifier" else {"labels": labels})).logits
        if kind == "seq2seq":
            assert m(**batch).loss is None and m(**batch).logits.shape == (4, 5, 40)
            logits = F.pad(logits, (0, 0, 0, 5 - logits.shape[1]))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.1)

    wanted = stepped(model, smoothed)
    trainer_of(model, rows, tmp_path, label_smoothing_factor=0.1).train()
    assert_same_weights(model, wanted)


def test_label_smoothing_that_can_not_be_had_is_named(tmp_path):
    model = model_of("lm")
    trainer = trainer_of(model, rows_of("lm", model), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*label_smoothing in the model"):
        trainer.train()
    model = model_of("seq2seq")
    for options in ({"label_smoothing_factor": 0.1}, {"loss": lambda *_, **__: 0.0}):
        with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func"):
            trainer_of(model, rows_of("seq2seq", model), tmp_path, **options).train()
    # The loss itself is an ordinary one.
    ids = torch.tensor([[5, 6, 7]])
    outputs = model_of("lm")(input_ids=ids)
    assert type(outputs.loss) is torch.Tensor and torch.equal(outputs[0], outputs.loss)
    outputs[0].backward()


@pytest.mark.parametrize("kind", ["seq2seq", "lm", "classifier"])
def test_a_loss_function_of_the_trainer(kind, tmp_path):
    model = model_of(kind)
    rows = rows_of(kind, model, decoder_ids=kind == "seq2seq")

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits
        if kind == "lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return 2.0 * F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    wanted = stepped(model, lambda m: 2.0 * m(**batch_of(rows)).loss)
    trainer_of(model, rows, tmp_path, loss).train()
    assert_same_weights(model, wanted)


def test_decoder_inputs_of_another_text_are_refused():
    model = model_of("seq2seq")
    batch = batch_of(rows_of("seq2seq", model, decoder_ids=True))
    model(**batch).loss.backward()
    batch["decoder_input_ids"][0, 1] = 30
    with pytest.raises(ValueError, match="are not the labels shifted by one place"):
        model(**batch)


@pytest.mark.parametrize("kind", ["seq2seq", "lm", "classifier"])
def test_checkpointed_layers_give_the_same_gradients(kind, tmp_path):
    """With dropout, whose mask must be the same the second time."""
    model = model_of(kind, dropout=0.3)
    rows = rows_of(kind, model)
    torch.manual_seed(3)
    wanted = stepped(model, lambda m: m(**batch_of(rows)).loss)
    checkpointed, calls = copy.deepcopy(model), []
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for module in checkpointed.modules():
        if type(module).__name__ == "Layer":
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    assert_same_weights(stepped(checkpointed, lambda m: m(**batch_of(rows)).loss), wanted)
    layers = 4 if kind == "seq2seq" else 2
    assert len(calls) == 2 * layers  # each ran twice
    checkpointed.gradient_checkpointing_disable()
    checkpointed(**batch_of(rows)).loss.backward()
    assert len(calls) == 3 * layers
    trainer_of(model, rows, tmp_path, gradient_checkpointing=True).train()
    assert any(getattr(module, "_checkpointing", None) for module in model.modules())


def test_checkpointing_that_can_not_be_had_is_refused():
    with pytest.raises(ValueError, match="LanguageModel: activation checkpointing has no offload"):
        model_of("lm").activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="MiniLMClassifier: it has no layers"):
        MiniLMClassifier(HeadConfig(["a", "b"])).gradient_checkpointing_enable()


# ---- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2seq", "lm", "classifier", "span"])
def test_an_output_is_copied_and_pickled(kind):
    if kind == "span":
        model = SpanModel(Encoder(300, *STACK[1:]))
        outputs = model(["q"], ["context"], [(0, 3)])
    else:
        model = model_of(kind)
        outputs = model(**batch_of(rows_of(kind, model)))
    for again in (copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert torch.equal(again.loss, outputs.loss) and not again.loss.requires_grad
        assert torch.equal(again.logits, outputs.logits) and again.num_tokens == outputs.num_tokens
        assert torch.equal(again.loss_sum, outputs.loss_sum)
        leaves, spec = torch.utils._pytree.tree_flatten(again)
        assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).logits, again.logits)
    assert len(pickle.dumps(outputs)) < 50_000  # and not the model
    outputs.loss.backward()
