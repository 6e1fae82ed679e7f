"""``fasttransformer train``: a model for one of five tasks from a file of JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ._output import UsageError, command, console, device_of, escape, print_json, progress, table

TASKS = ("summarize", "translate", "answer", "generate", "classify")
#: option → help; its type is that of TrainingOptions' field.
OPTIONS = {
    "steps": "optimizer steps in all, of a resumed run too",
    "batch_size": "examples of a forward pass, on each process",
    "accumulate": "forward passes of a step",
    "learning_rate": "at the end of the warm-up; it falls linearly to 0",
    "warmup": "steps of warm-up (a tenth of all, at most 500)",
    "weight_decay": "of AdamW, on matrices",
    "clip": "largest norm of a gradient, 0 = any",
    "seed": "of weights, dropout and the order of examples",
    "save_every": "steps between checkpoints",
    "eval_every": "steps between evaluations",
    "patience": "evaluations without a better loss after which training stops, 0 = never",
    "hold_out": "part of the data kept for evaluation without --eval-data",
    "eval_limit": "most evaluation records that are judged at the end",
    "vocab_size": "most tokens of the tokenizer",
    "embed_dim": "features of a token",
    "hidden_dim": "features inside a feed-forward block",
    "num_layers": "layers, of an encoder and of a decoder",
    "num_heads": "heads; they divide the features",
    "dropout": "probability",
    "max_length": "most tokens of a text; longer ones lose their end",
    "label_smoothing": "of the loss",
    "device": "cpu or cuda",
}


def _defaults() -> dict[str, Any]:
    from ..models.training import TrainingOptions

    return {field.name: field.default for field in dataclasses.fields(TrainingOptions)}


def run(args: argparse.Namespace) -> int:
    """0 when all steps are done or patience ended them, 1 when the loss is not finite."""
    from ..models.data import BadRecords, read_records
    from ..models.tasks import task_of
    from ..models.training import Checkpoint, Diverged, Interrupted, TrainingOptions, train

    out = Path(args.out)
    names = {field.name for field in dataclasses.fields(TrainingOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        saved = Checkpoint.load(out)
        if saved is not None and not args.resume:
            raise UsageError(
                f"{out} holds a run of {saved.step} steps; --resume continues it, another "
                "--out starts a new one"
            )
        if saved is not None:
            options = TrainingOptions(**saved.options).resumed(given)
        else:
            options = TrainingOptions(**given)
        _check_device(options.device)
        task = task_of(options.task, options.answers, options.encoder)
        records = read_records(args.data, task.fields, task.problem)
        evaluation = None
        if args.eval_data:
            evaluation = read_records(args.eval_data, task.fields, task.problem)
        shown = _Shown(options.steps, 0 if saved is None else saved.step, args.json)
        with warnings.catch_warnings(), shown:
            warnings.simplefilter("once")
            result = train(
                task, records, out, options, evaluation=evaluation, resume=args.resume,
                report=shown.report,
            )  # fmt: skip
    except (BadRecords, ImportError) as error:
        raise UsageError(str(error)) from None
    except Diverged as error:
        print(f"fasttransformer train: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(
            f"fasttransformer train: {error}; the same command with --resume continues from there",
            file=sys.stderr,
        )
        return 130
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out: {out} can't be written: {error.strerror}") from None
    if int(os.environ.get("RANK", "0")) == 0:
        _draw(result, out, task)
        _show(result, out, args.json)
    return 0


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch's, by device
        why = str(error).splitlines()[0].split(". ")[0]
        raise UsageError(f"--device: torch can't use {name} here: {why}") from None


class _Shown:
    """A bar where there is a terminal, and a line for each evaluation."""

    def __init__(self, steps: int, done: int, quiet: bool) -> None:
        self.steps, self.done = steps, done
        self.first = int(os.environ.get("RANK", "0")) == 0
        self.quiet = quiet or not self.first
        self.bar = progress()
        self.task = self.bar.add_task("training", total=steps, completed=done)
        self.out = console()
        self.loss, self.tokens, self.since = 0.0, 0.0, time.monotonic()

    def __enter__(self) -> _Shown:
        if self.first:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def report(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        if "eval_loss" in row:
            if not self.quiet:
                self.out.print(
                    f"step {step}: loss {self.loss:.4f}, evaluation {row['eval_loss']:.4f}"
                )
            return
        self.loss = row["loss"] if step == self.done + 1 else 0.95 * self.loss + 0.05 * row["loss"]
        self.bar.update(self.task, completed=step, description=f"loss {self.loss:.3f}")


def _draw(result: Any, out: Path, task: Any) -> None:
    from ..models.training.curves import draw

    try:
        draw(result.log, out / "curves.png", task)
    except ImportError:
        print("no curves: matplotlib is not installed", file=sys.stderr)


def _show(result: Any, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "steps": result.steps, "best": result.best, "stopped_early": result.stopped_early,
                "held_out": result.evaluated, "metrics": result.metrics,
                "baselines": result.baselines, "seconds": result.seconds,
                "cpu_seconds": result.cpu_seconds,
            }
        )  # fmt: skip
        return
    shown = console()
    early = ", stopped early" if result.stopped_early else ""
    shown.print(
        f"{result.steps} steps{early} in {result.seconds:.0f} s ({result.cpu_seconds:.0f} s of "
        "processor time)"
    )
    if result.best is not None:
        loss, step = result.best
        shown.print(f"best loss on {result.evaluated} evaluation records: {loss:.4f}, step {step}")
    if result.metrics:
        shown.print(scores_table(result.metrics, result.baselines))
    shown.print(f"the model is in {escape(str(out))}")


def scores_table(
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]],
    intervals: dict[str, tuple[float, float]] | None = None,
) -> Any:
    """A row for the model, one for the 95 % intervals of its scores, and one for each baseline."""
    body = table("", *metrics, right=1)

    def row(name: str, shown: dict[str, str]) -> None:
        body.add_row(escape(name), *(shown.get(key, "–") for key in metrics))

    row("model", {key: f"{score:g}" for key, score in metrics.items()})
    if intervals:
        row("95 % of samples", {key: f"{a:g} to {b:g}" for key, (a, b) in intervals.items()})
    for name, scores in baselines.items():
        row(name, {key: f"{score:g}" for key, score in scores.items()})
    return body


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "train",
        "train a model from a file of JSON lines: summaries, translations, answers, text, labels",
        "  fasttransformer train --task classify --data reviews.jsonl --out reviews\n"
        "  fasttransformer train --task summarize --data pages.jsonl --out summaries \\\n"
        "      --eval-data held_out.jsonl --steps 4000 --patience 5\n"
        "  fasttransformer train --task classify --data reviews.jsonl --out reviews --resume\n"
        "  fasttransformer train --task classify --encoder minilm --data reviews.jsonl --out r\n"
        "  torchrun --nproc-per-node 2 -m fasttransformer train --task translate …\n",
    )  # fmt: skip
    parser.add_argument("--task", choices=TASKS, required=True, help="what the model is to do")
    parser.add_argument("--data", required=True, metavar="FILE", help="records, one JSON a line")
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="folder for the model, checkpoint.pt, log.jsonl, training.json and curves.png",
    )  # fmt: skip
    parser.add_argument("--eval-data", metavar="FILE", help="records to choose the best step by")
    parser.add_argument(
        "--resume", action="store_true", help="continue from DIR's checkpoint, if there is one"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    defaults = _defaults()
    for name, text in OPTIONS.items():
        default = defaults[name]
        kind = int if default is None else type(default)
        parse = device_of if name == "device" else kind
        shown = text if default is None or name == "device" else f"{text} ({default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=parse, default=argparse.SUPPRESS,
            metavar={int: "N", float: "X"}.get(kind, "NAME"), help=shown,
        )  # fmt: skip
    parser.add_argument(
        "--bf16", action="store_true", default=argparse.SUPPRESS,
        help="matrix products in bfloat16",
    )  # fmt: skip
    parser.add_argument(
        "--shard", action="store_true", default=argparse.SUPPRESS,
        help="under torchrun, each process keeps its part of weights and optimizer (FSDP2)",
    )  # fmt: skip
    parser.add_argument(
        "--post-norm", dest="pre_norm", action="store_false", default=argparse.SUPPRESS,
        help="norms after each block, not before it",
    )  # fmt: skip
    parser.add_argument(
        "--positions", choices=("sinusoidal", "learned", "rotary", "alibi"),
        default=argparse.SUPPRESS, help="how tokens know their places (sinusoidal)",
    )  # fmt: skip
    parser.add_argument(
        "--answers", choices=("span", "text"), default=argparse.SUPPRESS,
        help="of the task answer: point into the context, or write (span)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=("scratch", "minilm"), default=argparse.SUPPRESS,
        help="of the task classify: all from scratch, or the pretrained MiniLM as it is and two "
        "layers on its vectors (scratch)",
    )  # fmt: skip
    parser.set_defaults(run=run)
