"""Training: exact accumulation, batches, schedule, early stopping, several processes, resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fasttransformer.models import Seq2SeqModel, TextModel
from fasttransformer.models.data import write_records
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import (
    Checkpoint,
    Diverged,
    TrainingOptions,
    batches,
    curves,
    loop,
    schedule,
    train,
)

SMALL = {"embed_dim": 32, "hidden_dim": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 300}
PAIRS = [{"source": f"{a} {b}", "target": f"{b} {a}"} for a in "abcdefgh" for b in "ijklmnop"]


def options(task="translate", **changes):
    return TrainingOptions(task, **{**SMALL, "steps": 6, "batch_size": 8, **changes})


def weights(folder):
    return TextModel.from_pretrained(folder).state_dict()


def assert_equal_models(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# ---- gradients ----------------------------------------------------------------------------------


class Recorded(torch.optim.SGD):
    """Keeps the gradients of its first step."""

    def step(self):
        self.seen = [
            p.grad.clone() for group in self.param_groups for p in group["params"]
            if p.grad is not None
        ]  # fmt: skip


def gradients(tmp_path, monkeypatch, **changes):
    made = {}

    def optimizer(model, options):
        made["it"] = Recorded(model.parameters(), lr=0.1)
        return made["it"]

    monkeypatch.setattr(loop, "_optimizer", optimizer)
    # b71: targets of 11 and 101 tokens.
    records = [{"source": "s", "target": "x" * 10}, {"source": "l", "target": "y" * 100}]
    chosen = options(dropout=0.0, hold_out=0.0, clip=0.0, steps=1, vocab_size=260, **changes)
    row = train(task_of("translate"), records, tmp_path, chosen).log[0]
    return row["loss"], made["it"].seen


def test_accumulation_weighs_every_token_alike(tmp_path, monkeypatch):
    whole = gradients(tmp_path / "whole", monkeypatch, batch_size=2)
    parts = gradients(tmp_path / "parts", monkeypatch, batch_size=1, accumulate=2)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for ours, wanted in zip(parts[1], whole[1]):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_clip_bounds_the_gradient(tmp_path):
    result = train(task_of("translate"), PAIRS, tmp_path / "a", options(clip=1e-3))
    assert all(row["norm"] > 1e-3 for row in result.log if "norm" in row)  # before it is cut


# ---- batches, schedule --------------------------------------------------------------------------


def test_batches_have_every_example_once_and_like_lengths():
    lengths = torch.randint(1, 200, (1000,)).tolist()
    made = batches.LengthBatches(lengths, 16, seed=3)
    epoch = made.epoch(0)
    assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch]
    assert sorted(spread)[len(spread) // 2] < 20
    assert epoch != made.epoch(1) and epoch != batches.LengthBatches(lengths, 16, seed=4).epoch(0)


def test_batches_go_on_at_any_place():
    lengths = list(range(10))
    made = iter(batches.LengthBatches(lengths, 3))
    all_of_them = [next(made) for _ in range(15)]
    for start in (1, 4, 5, 11):
        again = iter(batches.LengthBatches(lengths, 3, start=start))
        assert [next(again) for _ in range(15 - start)] == all_of_them[start:]


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 5), (10, 0), (10, 3), (10, 10)])
def test_no_step_has_a_rate_of_zero(steps, warmup):
    rates = [schedule.learning_rate(step, steps, warmup, 0.5) for step in range(steps)]
    assert all(0.0 < rate <= 0.5 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# ---- runs ---------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_files(tmp_path):
    result = train(task_of("translate"), PAIRS, tmp_path, options(steps=60, learning_rate=3e-3))
    losses = [row["loss"] for row in result.log if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert result.best is not None and result.metrics.keys() >= {"bleu", "chrf", "exact"}
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["metrics"] == result.metrics and written["options"]["steps"] == 60
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == result.log
    curves.draw(result.log, tmp_path / "curves.png", task_of("translate"))
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("task", "unit"),
    [("classify", "text"), ("answer", "question"), ("translate", "token"), ("generate", "token")],
)
@pytest.mark.parametrize(("steps", "shown"), [(3, "each step"), (200, "mean of 4 steps")])
def test_the_picture_says_what_it_shows(task, unit, steps, shown):
    log = [{"step": i + 1, "loss": 1.0 / (i + 1), "rate": 0.1} for i in range(steps)]
    log.append({"step": steps, "eval_loss": 9.0})
    losses = curves.figure_of(log, task_of(task)).axes[0]
    assert losses.get_ylabel() == f"loss per {unit}, nats" and task in losses.get_title()
    assert losses.get_legend().get_texts()[0].get_text() == f"training, {shown}"
    assert losses.get_ylim()[1] > 9.0, "the evaluation is above the picture"


def test_the_word_at_the_best_evaluation_is_inside_the_picture():
    log = [{"step": i + 1, "loss": 1.0, "rate": 0.1} for i in range(300)]
    log += [{"step": 10, "eval_loss": 1.0}, {"step": 300, "eval_loss": 2.0}]
    picture = curves.figure_of(log, task_of("translate"))
    picture.draw_without_rendering()
    losses = picture.axes[0]
    (word,) = losses.texts
    assert word.get_window_extent().x0 > losses.get_window_extent().x0


def test_the_seed_decides_all(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(task_of("translate"), PAIRS, tmp_path / name, options(seed=seed))
    assert_equal_models(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_equal_models(tmp_path / "a", tmp_path / "c")


def test_patience_ends_training_and_the_best_model_stays(tmp_path):
    chosen = options(steps=200, eval_every=2, patience=3, learning_rate=0.0, dropout=0.0)
    result = train(task_of("translate"), PAIRS, tmp_path, chosen)
    assert result.stopped_early and result.steps == 8 and result.best[1] == 2


def test_bf16_trains(tmp_path):
    result = train(task_of("translate"), PAIRS, tmp_path, options(steps=20, bf16=True))
    losses = [row["loss"] for row in result.log if "loss" in row]
    assert losses[-1] < losses[0]
    assert {x.dtype for x in weights(tmp_path).values()} == {torch.float32}


def test_a_loss_that_is_not_finite_is_told(tmp_path, monkeypatch):
    forward = Seq2SeqModel.forward

    def broken(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(Seq2SeqModel, "forward", broken)
    with pytest.raises(Diverged, match="step 1 the loss is nan"):
        train(task_of("translate"), PAIRS, tmp_path, options())


def test_a_vocabulary_that_does_not_fit(tmp_path):
    train(task_of("translate"), PAIRS, tmp_path, options())
    config = tmp_path / "config.json"
    size = TextModel.from_pretrained(tmp_path).config.vocab_size
    text = config.read_text().replace(f'"vocab_size": {size}', f'"vocab_size": {size + 5}')
    config.write_text(text)
    with pytest.raises(ValueError, match=f"a vocabulary of {size}, but .* of {size + 5}"):
        TextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"hold_out": 1.0}, "hold_out is 1.0"),
        ({"vocab_size": 200}, "vocab_size is 200"),
        ({"embed_dim": 30}, "multiple of num_heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"answers": "both"}, "answers is 'both'"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


# ---- going on -----------------------------------------------------------------------------------


def test_a_run_goes_on_bit_by_bit(tmp_path, monkeypatch):
    chosen = options(steps=12, save_every=5, eval_every=4)
    train(task_of("translate"), PAIRS, tmp_path / "whole", chosen)
    save = Checkpoint.save

    def stop(self, folder):
        save(self, folder)
        raise SystemExit  # what is behind the checkpoint is lost

    monkeypatch.setattr(Checkpoint, "save", stop)
    with pytest.raises(SystemExit):
        train(task_of("translate"), PAIRS, tmp_path / "parts", chosen)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert Checkpoint.load(tmp_path / "parts").step == 5
    torch.manual_seed(99)
    resumed = train(task_of("translate"), PAIRS, tmp_path / "parts", chosen, resume=True)
    assert_equal_models(tmp_path / "whole", tmp_path / "parts")
    whole = Checkpoint.load(tmp_path / "whole")
    assert resumed.log == whole.log
    last = Checkpoint.load(tmp_path / "parts")
    for ours, theirs in zip(last.optimizer["state"].values(), whole.optimizer["state"].values()):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_go_on(tmp_path):
    train(task_of("translate"), PAIRS, tmp_path, options())
    with pytest.raises(ValueError, match="the records are not those"):
        train(task_of("translate"), PAIRS[1:], tmp_path, options(), resume=True)
    with pytest.raises(ValueError, match="batch_size is 4, but the run that is resumed has 8"):
        train(task_of("translate"), PAIRS, tmp_path, options(batch_size=4), resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        train(task_of("translate"), PAIRS, tmp_path, options(), resume=True)


def started(tmp_path, out, steps, *more):
    """A training process whose checkpoints come every 3 steps."""
    data = tmp_path / "pairs.jsonl"
    write_records(data, PAIRS)
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [
        sys.executable, "-m", "fasttransformer", "train", "--task", "translate",
        "--data", str(data), "--out", str(out), "--steps", str(steps),
        "--batch-size", "8", "--save-every", "3",
        "--eval-every", "50", "--eval-limit", "0", *small, *more,
    ]  # fmt: skip


def wait_for(path, process):
    deadline = time.monotonic() + 50
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["f32", "bf16"])
def test_a_killed_process_goes_on_bit_by_bit(tmp_path, precision):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = started(tmp_path, tmp_path / "killed", 150, *precision)
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "killed/checkpoint.pt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < Checkpoint.load(tmp_path / "killed").step < 150
    subprocess.run([*killed, "--resume"], env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = started(tmp_path, tmp_path / "whole", 150, *precision)
    subprocess.run(whole, env=environment, check=True, stdout=subprocess.DEVNULL)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_equal_models(tmp_path / "killed", tmp_path / "whole")


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = started(tmp_path, tmp_path / "out", 100_000)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out/checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    step = Checkpoint.load(tmp_path / "out").step
    assert f"after step {step}" in said


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, shard):
    """By DDP, or by FSDP2 with accumulation, and going on from its checkpoint."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", str(20000 + os.getpid() % 20000)]  # fmt: skip
    two = started(tmp_path, tmp_path / "two", 4, "--dropout", "0", "--eval-every", "3")[1:]
    if shard:
        two += ["--shard", "--batch-size", "4", "--accumulate", "2"]
    for steps in (4, 6) if shard else (4,):
        more = ["--resume", "--steps", str(steps)]
        command = [*launcher, *two, *more]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        chosen = options(steps=steps, batch_size=16, dropout=0.0, eval_every=3, eval_limit=0)
        train(task_of("translate"), PAIRS, tmp_path / "one", chosen, resume=True)
    ours, theirs = Checkpoint.load(tmp_path / "two"), Checkpoint.load(tmp_path / "one")
    assert len(ours.random) == 2 and len(ours.log) == (9 if shard else 6)
    for a, b in zip(ours.log, theirs.log):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, weights(tmp_path / "one")[name], rtol=0, atol=3e-4)


def test_one_process_has_nothing_to_shard(tmp_path):
    with pytest.raises(ValueError, match="shard needs several processes"):
        train(task_of("translate"), PAIRS, tmp_path / "out", options(shard=True))
    assert not (tmp_path / "out").exists()


def test_several_processes_without_accelerate_are_told(monkeypatch):
    from fasttransformer.models.training import devices

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'fasttransformer\[train\]'"):
        devices.devices("cpu")
