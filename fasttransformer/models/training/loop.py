"""A run of training: AdamW, warm-up and decay, accumulation, evaluation, checkpoints.

A step's gradient is that of the sum of all its losses divided by the number of all its tokens,
however many forward passes and processes it is computed in. A mean of the passes' means would give
the tokens of short texts more weight.

A run that is killed, and one that is interrupted, goes on from its last checkpoint and ends in the
same weights, bit by bit, as one that was not.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019 (arXiv:1711.05101);
early stopping: Prechelt, Early Stopping, But When?, 1998.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.records import Record
from ..data.split import split
from ..modes import evaluating
from ..pretrained import TextModel
from ..tasks import Example, Scores, Task
from ..tokenizer import FILE as TOKENIZER_FILE
from ..tokenizer import Tokenizer, write_atomically
from .batches import LengthBatches
from .checkpoints import Checkpoint, random_state, set_random_state
from .devices import Devices, devices
from .options import TrainingOptions
from .schedule import learning_rate

RESULT_FILE, LOG_FILE = "training.json", "log.jsonl"
#: As Vaswani et al. (2017), section 5.3, have them: with the default of 0.999 the second moment
#: remembers the warm-up's gradients for longer than a small run lasts.
BETAS = (0.9, 0.98)
EVALUATION_BATCH = 32


class Interrupted(Exception):
    """SIGINT or SIGTERM came; a checkpoint is written."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step, self.signal_number = step, signal_number


class Diverged(ArithmeticError):
    """A loss or a gradient is not finite; the last checkpoint stays."""


@dataclass
class Result:
    """What came of a run.

    Attributes:
        steps: done.
        best: loss and step of the best evaluation; None without evaluation.
        stopped_early: patience ended it.
        evaluated: number of evaluation records.
        metrics, baselines: on the evaluation records; empty without them.
        seconds, cpu_seconds: of training, wall clock and of all threads.
        log: loss and rate by step.
    """

    steps: int
    best: tuple[float, int] | None
    stopped_early: bool
    evaluated: int
    metrics: Scores = field(default_factory=dict)
    baselines: dict[str, Scores] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


#: Called with a row of the log after each step: step, loss, rate, norm; or step, eval_loss.
Report = Callable[[dict[str, float]], None]


def train(
    task: Task,
    records: Sequence[Record],
    out: str | Path,
    options: TrainingOptions,
    *,
    evaluation: Sequence[Record] | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> Result:
    """Trains a model and saves it in the folder ``out``.

    The folder gets the model (of the best evaluation, or the last without any), ``checkpoint.pt``,
    ``log.jsonl`` and ``training.json``.

    Args:
        task: from :func:`fasttransformer.models.tasks.task_of`.
        records: of the task.
        out: made if need be.
        options: see :class:`TrainingOptions`.
        evaluation: records that the best step is chosen by; a part of ``records`` unless given.
        resume: go on from the checkpoint in ``out``, if there is one.
        report: called after each step and each evaluation.

    Raises:
        ValueError: records that don't fit the task; with ``resume``, other records than the run's.
        Diverged: a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came.
        ImportError: several processes without accelerate.

    >>> import tempfile
    >>> from fasttransformer.models.tasks import task_of
    >>> records = [{"text": f"{n} is {w}", "label": w} for n in range(9) for w in ("odd", "even")]
    >>> options = TrainingOptions("classify", steps=2, embed_dim=24, vocab_size=260)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     train(task_of("classify"), records, out, options).steps
    2
    """
    place = devices(options.device, options.shard)
    try:
        return _Run(task, records, Path(out), options, place, evaluation, resume, report).run()
    finally:
        place.close()


def held_out(
    records: Sequence[Record], part: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(for training, for evaluation); equal inputs are on one side."""
    first = "question" if records and "question" in records[0] else None

    def marks(record: Record) -> Iterator[str]:
        yield record["context"] + "\0" + record[first] if first else next(iter(record.values()))

    training, evaluation = split(records, [part], marks, seed)
    return training, evaluation


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        task: Task,
        records: Sequence[Record],
        out: Path,
        options: TrainingOptions,
        place: Devices,
        evaluation: Sequence[Record] | None,
        resume: bool,
        report: Report | None,
    ) -> None:
        self.task, self.out, self.options, self.place = task, out, options, place
        self.report = report or (lambda row: None)
        self.digest = _digest([records, evaluation])
        given = records
        if evaluation is None:
            records, evaluation = held_out(records, options.hold_out, options.seed)
        if not records:
            raise ValueError("there is no record to train on")
        problem = task.check(given)
        if problem:
            raise ValueError(problem)
        self.records, self.evaluation = records, evaluation
        self.log: list[dict[str, float]] = []
        self.best: tuple[float, int] | None = None
        self.worse, self.step = 0, 0
        self.seconds = self.cpu_seconds = 0.0
        self.stopped: int | None = None

        saved = Checkpoint.load(out) if resume else None
        if saved is not None and saved.records != self.digest:
            raise ValueError(f"the records are not those that the run in {out} was trained on")
        if saved is not None:
            TrainingOptions(**saved.options).resumed(options.to_dict())
        torch.manual_seed(options.seed)
        tokenizer: Tokenizer | None
        if saved is None:
            tokenizer = task.tokenizer(records, options.vocab_size)
        else:
            tokenizer = Tokenizer.load(out) if (out / TOKENIZER_FILE).exists() else None
        self.model = task.build(given, tokenizer, options)
        self.examples = task.examples(self.model, records)
        self.held_out = task.examples(self.model, evaluation) if evaluation else []
        if saved is not None:
            self.model.load_state_dict(saved.model)
        out.mkdir(parents=True, exist_ok=True)
        self.trained = place.prepare(self.model)
        self.optimizer = _optimizer(self.model, options)
        # Each process draws its own dropout.
        torch.manual_seed(options.seed + place.rank)
        if saved is not None:
            self._continue(saved)
        else:
            self._save_model()

    def _continue(self, saved: Checkpoint) -> None:
        if len(saved.random) != self.place.world:
            raise ValueError(
                f"the run in {self.out} has {len(saved.random)} processes, but now there are "
                f"{self.place.world}"
            )
        self.optimizer.load_state_dict(self.place.parts(saved.optimizer, self.optimizer))
        set_random_state(saved.random[self.place.rank], self.place.device)
        self.step, self.best, self.worse = saved.step, saved.best, saved.worse
        self.log, self.seconds, self.cpu_seconds = saved.log, saved.seconds, saved.cpu_seconds

    # ---- the steps ----------------------------------------------------------------------------

    def run(self) -> Result:
        options = self.options
        started, cpu_started = time.monotonic(), _cpu_seconds()
        done, cpu_done = self.seconds, self.cpu_seconds
        whole = options.batch_size * options.accumulate * self.place.world
        batches: Any = LengthBatches(
            [example.length for example in self.examples], whole, seed=options.seed,
            start=self.step,
        )  # fmt: skip
        # A loader draws a seed for its workers when it starts: from the generator that dropout
        # draws from, if it has none of its own, and a resumed run would start it once more.
        loader = iter(
            DataLoader(
                self.examples,  # type: ignore[arg-type]
                batch_sampler=batches,
                collate_fn=list,
                generator=torch.Generator(),
            )
        )
        stopped_early = self._patience_is_over()
        self.model.train()
        with self._signals():
            while self.step < options.steps and not stopped_early:
                row = self._train_on(next(loader))
                self.seconds = done + time.monotonic() - started
                self.cpu_seconds = cpu_done + _cpu_seconds() - cpu_started
                self.log.append(row)
                self.report(row)
                last = self.step == options.steps
                if self.held_out and (self.step % options.eval_every == 0 or last):
                    self._evaluate()
                    stopped_early = self._patience_is_over()
                signal_number = int(max(self.place.gather(self.stopped or 0)))
                if self.step % options.save_every == 0 or last or stopped_early or signal_number:
                    self._save()
                if signal_number and not (last or stopped_early):
                    raise Interrupted(self.step, signal_number)
        self.place.wait()
        return self._result(stopped_early)

    def _train_on(self, batch: list[Example]) -> dict[str, float]:
        """A step on a batch, of which this process computes its part."""
        options, place = self.options, self.place
        rate = learning_rate(self.step, options.steps, options.warmup_steps, options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = sum(example.weight for example in batch)
        every = place.world * options.accumulate
        loss = 0.0
        for turn in range(options.accumulate):
            # Examples of a batch are in order of length: every part gets short and long ones.
            part = batch[turn * place.world + place.rank :: every]
            last = turn == options.accumulate - 1
            # A process without examples still takes part in what all do together.
            if not part and not (place.sharded or (last and place.world > 1)):
                continue
            if last:
                loss += self._backward(part, batch, weight)
            else:
                with place.local(self.trained):
                    loss += self._backward(part, batch, weight)
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        norm = float(place.whole(clipped))
        loss = place.sum(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"at step {self.step + 1} the loss is {loss} and the gradient's norm {norm}; a "
                f"lower learning_rate than {options.learning_rate} may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": loss, "rate": rate, "norm": norm, "weight": weight}

    def _backward(self, part: list[Example], batch: list[Example], weight: int) -> float:
        """Adds a part's share of the gradient; returns its share of the loss."""
        place = self.place
        with self._autocast():
            output = self.task.loss(self.trained, part or batch[:1])
        assert output.loss_sum is not None
        share = output.loss_sum / weight * (1.0 if part else 0.0)
        # accelerate divides the sum over processes by their number.
        (share * place.world).backward()
        return float(share.detach())

    def _autocast(self) -> Any:
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.options.bf16)

    # ---- evaluation and files -----------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The loss on the evaluation examples, a share of which is each process's."""
        rank, world = self.place.rank, self.place.world
        total, weight = 0.0, 0
        with evaluating(self.model):
            # As many passes in each process: sharded weights are gathered by all of them together.
            for first in range(0, len(self.held_out), EVALUATION_BATCH * world):
                part = self.held_out[first + rank : first + EVALUATION_BATCH * world : world]
                with self._autocast():
                    output = self.task.loss(self.model, part or self.held_out[:1])
                assert output.loss_sum is not None
                total += float(output.loss_sum) if part else 0.0
                weight += sum(example.weight for example in part)
        loss = self.place.sum(total) / self.place.sum(weight)
        row = {"step": self.step, "eval_loss": loss}
        self.log.append(row)
        self.report(row)
        if self.best is None or loss < self.best[0]:
            self.best, self.worse = (loss, self.step), 0
            self._save_model()
        else:
            self.worse += 1

    def _patience_is_over(self) -> bool:
        return 0 < self.options.patience <= self.worse

    def _save(self) -> None:
        states = self.place.gather(random_state(self.place.device))
        if not self.held_out:
            self._save_model()
        model = self.place.whole(self.model.state_dict())
        optimizer = self.place.whole(self.optimizer.state_dict())
        if self.place.is_main:
            Checkpoint(
                self.step, self.options.to_dict(), self.digest, model, optimizer, states,
                self.best, self.worse, self.log, self.seconds, self.cpu_seconds,
            ).save(self.out)  # fmt: skip
            lines = "".join(json.dumps(row) + "\n" for row in self.log)
            write_atomically(self.out / LOG_FILE, lines.encode())
        self.place.wait()

    def _save_model(self) -> None:
        state = self.place.whole(self.model.state_dict())
        if self.place.is_main:
            self.model.save_pretrained(self.out, state_dict=state)

    def _result(self, stopped_early: bool) -> Result:
        result = Result(
            self.step, self.best, stopped_early, len(self.evaluation), seconds=self.seconds,
            cpu_seconds=self.cpu_seconds, log=self.log,
        )  # fmt: skip
        limit = self.options.eval_limit
        if self.evaluation and limit and self.place.is_main:
            judged = self.evaluation[:limit]
            best: Any = TextModel.from_pretrained(self.out, device=self.place.device)
            result.metrics = self.task.evaluate(best, judged)
            result.baselines = self.task.baselines(best, self.records, judged)
        if self.place.is_main:
            description = {
                "task": self.task.name, "options": self.options.to_dict(), "steps": self.step,
                "best": self.best, "stopped_early": stopped_early,
                "records": len(self.records), "held_out": len(self.evaluation),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "processes": self.place.world, "threads": torch.get_num_threads(),
                "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
                "metrics": result.metrics, "baselines": result.baselines,
            }  # fmt: skip
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            write_atomically(self.out / RESULT_FILE, text.encode())
        self.place.wait()
        return result

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after its step; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.stopped is not None:
                raise KeyboardInterrupt
            self.stopped = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW; biases, norms and embeddings don't decay."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and "embedding" not in name
        (decayed if decays else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS, fused=True)


def _digest(records: Any) -> str:
    text = json.dumps(records, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
