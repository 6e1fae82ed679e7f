"""Whether a swapped model computes what the original does: two questions, each with its own bound.

Is it the same formula? Both in float64, where rounding hides nothing:

    max |ours64 - ref64| <= 16 max |moved64 - ref64| + 64 rounding steps of float64

``moved64`` is the original with every weight and input moved by 2^-40 of itself: what is no larger
is rounding, carried on as far as this model carries it (backward error analysis: Higham, Accuracy
and Stability of Numerical Algorithms, 2002, chapter 1). Another eps, a scale of one head, a column
of weights are far beyond it, whatever the dtype that the model runs in.

Is it as accurate? Each in the model's own dtype, on the kernels that really run:

    max |ours - ref64| <= 2 max |original - ref64| + one rounding step of the dtype

for every output and for the gradient of every parameter and floating-point input. A gradient's own
error counts as no less than the median relative error of the model's gradients, for some are right
by luck; and one that is zero in exact arithmetic (that of a key projection's bias, which softmax
cancels) is noise in all three runs and is allowed the rounding step of the largest.

A deep model on a few tokens hands one rounding error on to all that follows, so the ratio of two
single errors is a matter of luck (0.2 to 8 for MiniLM against itself on a few words). What breaks
the second rule is therefore drawn again, with all weights moved by a few roundings, the same in the
three copies, and is held to it by the geometric means of the new draws alone: no draw can make up
for the others, and what is less accurate in truth is so in the mean.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from ._contract import DRAWS, Comparison, mean, rounding_step
from ._runs import Progress, Results, Subject, cast, disable_dropout, repeats, run, tensors

#: A float64 gradient this far below the model's largest is what rounding left of zero.
_ZERO = 2.0**-40
#: A mean error this many times the bound is no matter of luck: no further draw.
_HOPELESS = 30.0
#: The move of the weights that the comparison in float64 takes for rounding, and how often it is
#: drawn. An implementation of ours is at about 2^-48, a rounding to float32 inside at 2^-24.
_MOVE = 2.0**-40
_MOVES = 4


@dataclass(frozen=True)
class Compared:
    """One output or gradient: the swapped model's error, the original's own, the bound."""

    name: str
    max_error: float
    reference_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.allowed  # False for NaN

    @property
    def times_allowed(self) -> float:
        """The error as a multiple of the bound: more than 1 is too much."""
        if self.ok:
            return self.max_error / self.allowed if self.allowed else 0.0
        return self.max_error / self.allowed if self.allowed else math.inf

    @staticmethod
    def mean(draws: Sequence[Compared]) -> Compared:
        found = mean([Comparison(d.max_error, d.allowed, d.reference_error) for d in draws])
        return Compared(draws[0].name, found.error, found.peer_error, found.allowed)


@dataclass(frozen=True)
class Verification:
    """The result of ``report.verify``: ``outputs`` and ``gradients`` in the model's own dtype, and
    ``float64``, both of them in float64; each entry with ``name``, ``max_error``,
    ``reference_error``, ``allowed`` and ``ok``. ``problem`` says what kept the comparison from
    being made, and is None otherwise; ``judged`` is False of a model that runs, but can't be
    compared with itself in float64."""

    outputs: tuple[Compared, ...] = ()
    gradients: tuple[Compared, ...] = ()
    float64: tuple[Compared, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = field(default=())
    judged: bool = True

    @property
    def ok(self) -> bool | None:
        """Whether every output and every gradient is within its bounds; None if not judged."""
        if not self.judged:
            return None
        entries = self.outputs + self.gradients + self.float64
        return self.problem is None and bool(entries) and all(entry.ok for entry in entries)

    @property
    def max_error(self) -> float:
        """The largest error of an output of the swapped model."""
        return max((entry.max_error for entry in self.outputs), default=math.nan)

    @property
    def reference_error(self) -> float:
        """The largest error of an output of the original in its own dtype."""
        return max((entry.reference_error for entry in self.outputs), default=math.nan)

    def rows(self, gradients: int = 3) -> list[Compared]:
        """The outputs, what failed, and the gradients that come closest to their bound."""
        failed = [e for e in self.gradients + self.float64 if not e.ok]
        passed = (g for g in self.gradients if g.ok)
        worst = sorted(passed, key=lambda g: -g.times_allowed)[:gradients]
        return [*self.outputs, *failed, *worst]

    def __str__(self) -> str:
        if self.problem is not None:
            lines = [f"verify: not compared: {self.problem}"]
            return "\n".join(lines + [f"  note: {note}" for note in self.notes])
        good = sum(g.ok for g in self.gradients)
        verdict = "ok" if self.ok else "FAILED"
        line = f"verify: {verdict}; {good} of {len(self.gradients)} gradients within bounds"
        if self.float64:
            same = sum(e.ok for e in self.float64)
            line += f"; in float64, {same} of {len(self.float64)} outputs and gradients the same"
        lines = [line]
        rows = self.rows()
        width = max((len(row.name) for row in rows), default=4)
        lines.append(f"  {'':{width}}  {'swapped':>9}  {'original':>9}  {'allowed':>9}")
        for row in rows:
            numbers = (row.max_error, row.reference_error, row.allowed)
            cells = "  ".join(f"{number:9.2e}" for number in numbers)
            lines.append(f"  {row.name:{width}}  {cells}  {'ok' if row.ok else 'FAILED'}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def verify(
    model: Module, *args: Any, show: bool = True, gradients: bool = True, **kwargs: Any
) -> Verification:
    """See :meth:`fasttransformer.swap.Report.verify`; ``show`` and ``gradients`` are its own."""
    try:
        result = _verify(model, args, kwargs, gradients, show)
    except Exception as error:  # whatever a model does on its inputs is an answer, not a crash
        result = Verification(problem=f"{type(error).__name__}: {error}")
    if show:
        _show(result)
    return result


def _show(result: Verification) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(result)
        return
    if result.problem is not None or not Console().is_terminal:
        print(result)
        return
    table = Table("", "swapped", "original", "allowed", "")
    for row in result.rows():
        style = "" if row.ok else "bold red"
        numbers = (f"{n:.2e}" for n in (row.max_error, row.reference_error, row.allowed))
        table.add_row(row.name, *numbers, "ok" if row.ok else "FAILED", style=style)
    table.title = str(result).splitlines()[0]
    Console().print(table)
    for note in result.notes:
        print(f"note: {note}")


def _verify(
    model: Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool, show: bool
) -> Verification:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        progress = Progress(model, gradients, show)
        narrow = Subject(model)
        notes: list[str] = []
        calm = disable_dropout(narrow.module)
        if calm and not repeats(narrow.original(), args, kwargs):
            calm = False
            notes.append("compared in eval mode: the model draws random numbers in training mode")

        def prepare(subject: Subject) -> Subject:
            disable_dropout(subject.module)
            if not calm:
                subject.module.eval()
            return subject

        progress("the original in float64")
        prepare(narrow).reset(model)
        wide = prepare(Subject(model).double())
        narrowest = _Narrowest()
        try:
            truth = run(wide.original(), args, kwargs, gradients, torch.float64, narrowest)
        except Exception as error:
            peer = run(narrow.original(), args, kwargs, False)  # wrong inputs are named by this
            return _not_judged(error, peer, run(narrow.swapped(), args, kwargs, False))
        progress("the swapped model in float64")
        noise = _Noise()
        formula: tuple[Compared, ...] = ()
        try:
            wide.reset(model)
            ours64 = _errors(run(wide.swapped(), args, kwargs, gradients, torch.float64), truth)
        except Exception as error:  # a forced backend, or a device, without float64
            notes.append(f"not compared in float64: {type(error).__name__}: {error}")
        else:
            move = max(_MOVE, 16 * narrowest.step)
            if move > _MOVE:
                notes.append(_rounds_inside(narrowest.step))
            moved: dict[str, float] = {}
            for count in range(_MOVES):
                progress(f"the original in float64, moved: {count + 1} of {_MOVES}")
                wide.reset(model)
                noise.move([wide.original()], move)
                inputs = noise.moved(args, move), noise.moved(kwargs, move)
                errors = _errors(run(wide.module, *inputs, gradients), truth)
                moved = {name: max(error, moved.get(name, 0.0)) for name, error in errors.items()}
            formula = _compare_formula(ours64, truth, moved)
        given = (*model.parameters(), *(t for _, t in tensors((args, kwargs))))
        if {t.dtype for t in given if t.is_floating_point()} == {torch.float64}:
            return Verification(*_split(formula), notes=tuple(notes))
        wide.reset(model)

        def draw(truth: Results) -> tuple[Compared, ...]:
            got = run(narrow.swapped(), args, kwargs, gradients)
            peer = run(narrow.original(), args, kwargs, gradients)
            found = _compare("", got.outputs, truth.outputs, peer.outputs)
            return found + _compare("grad ", got.gradients, truth.gradients, peer.gradients)

        progress("both in the model's own dtype")
        first = draw(truth)
        del truth
        broken: dict[str, list[Compared]] = {e.name: [] for e in first if not e.ok and e.allowed}
        means: dict[str, Compared] = {}
        again = broken and all(entry.ok for entry in formula)  # else the answer is known
        for count in range(1, DRAWS + 1 if again else 0):
            progress(f"{len(broken)} of {len(first)} drawn again: {count} of at most {DRAWS}")
            noise.move([narrow.module, wide.module], 8.0)
            for entry in draw(run(wide.original(), args, kwargs, gradients, torch.float64)):
                if entry.name in broken:
                    broken[entry.name].append(entry)
            means = {name: Compared.mean(draws) for name, draws in broken.items()}
            if count >= 4 and any(not e.times_allowed < _HOPELESS for e in means.values()):
                break
        if means:
            notes.append(f"geometric means of {count} draws of the rounding: {', '.join(means)}")
    entries = [means.get(entry.name, entry) for entry in first]
    return Verification(*_split(entries), formula, notes=tuple(notes))


def _rounds_inside(step: float) -> str:
    dtype = next(d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
                 if torch.finfo(d).eps >= step)  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    return (
        f"the model computes a part in {name} whatever its own dtype; so the comparison in float64 "
        f"finds a difference only if it is larger than {name}'s rounding, {step:.0e}"
    )


def _not_judged(error: Exception, peer: Results, ours: Results) -> Verification:
    """For a model that runs in its own dtype alone, one of int8 weights for instance."""
    differences = _errors(ours, peer)
    sizes = {name: _largest(t) for name, t in peer.outputs.items()}
    name = max(differences, key=lambda n: differences[n], default="")
    return Verification(
        problem=f"the original can't be judged in float64 ({type(error).__name__}: "
        f"{str(error).splitlines()[0]})",
        judged=False,
        notes=(
            f"swapped and original differ by at most {differences[name]:.2e} in {name}, whose "
            f"largest number is {sizes.get(name, 0.0):.2e}",
        )
        if name
        else (),
    )


def _split(entries: Sequence[Compared]) -> tuple[tuple[Compared, ...], tuple[Compared, ...]]:
    """The outputs and the gradients among entries."""
    gradients = tuple(e for e in entries if e.name.startswith(("grad ", "float64 grad ")))
    return tuple(e for e in entries if e not in gradients), gradients


class _Noise:
    """Random relative moves, the same in every call of verify and whatever the models draw."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def move(self, models: Sequence[Module], size: float) -> None:
        """Moves every weight of the first, and those of the others along with it.

        ``size`` is relative to the weight, or if 1 and more in roundings of its dtype.
        """
        with torch.no_grad():
            for first, *rest in zip(*(m.parameters() for m in models), strict=True):
                if first.is_floating_point():
                    self._move(first, size)
                for other in rest:
                    other.copy_(first)

    def moved(self, value: Any, size: float) -> Any:
        """Inputs for a run in float64, moved."""
        value = cast(value, torch.float64)
        with torch.no_grad():
            for _, tensor in tensors(value):
                if tensor.is_floating_point():
                    before = tensor.clone()
                    self._move(tensor, size)
                    # A mask's -inf and lowest number are no quantities that a rounding could move.
                    tensor.copy_(torch.where(before.abs() < 2.0**64, tensor, before))
        return value

    def _move(self, x: Tensor, size: float) -> None:
        if size >= 1.0:
            size *= torch.finfo(x.dtype).eps
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        # Repeated in large tensors, at a period that is no multiple of any row's: random numbers
        # for every weight would take longer than the model does.
        noise = torch.randn(min(65521, flat.numel()), generator=self.generator).to(flat)
        for part in flat.split(max(1, len(noise))):
            part.addcmul_(part, noise[: len(part)], value=size)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view(x.shape))


class _Narrowest(TorchDispatchMode):
    """The coarsest rounding of what is computed inside: 2^-52 if all of it is float64."""

    step = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for _, tensor in tensors(out):
            if tensor.is_floating_point():
                self.step = max(self.step, torch.finfo(tensor.dtype).eps)
        return out


def _errors(found: Results, truth: Results) -> dict[str, float]:
    """The error of each output and gradient; infinite where only one of the two has it, or where
    it has another size."""
    errors = {}
    for name, got, want in _pairs(found, truth):
        missing = got is None or want is None or got.shape != want.shape
        errors[name] = math.inf if missing else _error(got, want)
    return errors


def _pairs(found: Results, truth: Results) -> Iterator[tuple[str, Any, Any]]:
    for prefix, mine, theirs in (
        ("", found.outputs, truth.outputs),
        ("grad ", found.gradients, truth.gradients),
    ):
        for name in dict.fromkeys([*theirs, *mine]):
            yield prefix + name, mine.get(name), theirs.get(name)


def _compare_formula(
    ours: dict[str, float], truth: Results, moved: dict[str, float]
) -> tuple[Compared, ...]:
    """Both in float64; the bound is what moving the weights and inputs does to the original."""
    found = []
    largest = max((_largest(t) for t in truth.gradients.values()), default=0.0)
    sizes = {name: _largest(t) for name, t in truth.outputs.items()}
    # Some gradients are zero but for rounding, which is of the size of the others'.
    sizes |= {f"grad {name}": largest for name in truth.gradients}
    for name, error in ours.items():
        noise, size = moved.get(name, 0.0), sizes.get(name, 0.0)
        steps = 64 * rounding_step(torch.float64, size) if size else 0.0
        allowed = 16 * noise + steps if math.isfinite(noise) and error < math.inf else 0.0
        found.append(Compared(f"float64 {name}", error, noise, allowed))
    return tuple(found)


def _error(out: Tensor, truth: Tensor) -> float:
    """The largest error where the truth is finite; of integers, how many differ."""
    if not truth.is_floating_point():
        return (out != truth).sum().item()
    return _largest(out - truth, truth)


def _compare(
    prefix: str, ours: dict[str, Tensor], wide: dict[str, Tensor], plain: dict[str, Tensor]
) -> tuple[Compared, ...]:
    found: dict[str, Compared] = {}
    magnitudes: dict[str, float] = {}
    for name in dict.fromkeys([*wide, *ours]):
        if name not in ours or name not in wide or ours[name].shape != wide[name].shape:
            # One model has it and the other does not (or another size): an error without a bound.
            found[name] = Compared(prefix + name, math.inf, 0.0, 0.0)
        else:
            magnitudes[name] = _largest(wide[name])
            found[name] = _compared(prefix + name, ours[name], wide[name], plain.get(name))
    if prefix and magnitudes:
        largest = max(magnitudes.values())
        zero = {name for name, size in magnitudes.items() if size <= _ZERO * largest}
        relative = [found[n].reference_error / m for n, m in magnitudes.items() if n not in zero]
        typical = statistics.median(relative) if relative else 0.0
        for name, size in magnitudes.items():
            floor = 2 * typical * size + rounding_step(
                ours[name].dtype, largest if name in zero else size
            )
            if floor > found[name].allowed:
                found[name] = dataclasses.replace(found[name], allowed=floor)
    return tuple(found.values())


def _compared(name: str, ours: Tensor, wide: Tensor, plain: Tensor | None) -> Compared:
    if not wide.is_floating_point():
        other = wide if plain is None else plain
        error, peer_error = (_error(t.to(wide.dtype), wide) for t in (ours, other))
        return Compared(name, error, peer_error, 2 * peer_error + 1)  # one index may tip over
    peer = wide.double() if plain is None else plain.double()
    error = _error(ours, wide)
    peer_error = _largest(peer - wide, peer - wide)
    step = rounding_step(ours.dtype, _largest(wide))
    return Compared(name, error, peer_error, 2 * peer_error + step)


def _largest(tensor: Tensor, where: Tensor | None = None) -> float:
    """The largest magnitude among the entries at which ``where``, or the tensor, is finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    usable = (tensor if where is None else where).isfinite()
    size = tensor.abs()
    return (size if usable.all() else torch.where(usable, size, 0.0)).max().item()
