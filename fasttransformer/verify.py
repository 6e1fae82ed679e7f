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

import contextlib
import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from ._contract import DRAWS, Comparison, mean, rounding_step

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
    being made, and is None otherwise."""

    outputs: tuple[Compared, ...] = ()
    gradients: tuple[Compared, ...] = ()
    float64: tuple[Compared, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every output and every gradient is within its bounds."""
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
            return f"verify: not compared: {self.problem}"
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
        result = _verify(model, args, kwargs, gradients)
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
    model: Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool
) -> Verification:
    from .swap import restore

    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        original = copy_of(model)
        restore(original)
        notes: list[str] = []
        calm = _make_calm(original)
        if calm and not _repeats(original, args, kwargs):
            calm = False
            notes.append("compared in eval mode: the model draws random numbers in training mode")

        def prepare(module: Module) -> Module:
            _make_calm(module)
            return module if calm else module.eval()

        noise = _Noise()
        wide = prepare(copy_of(original).double())
        narrowest = _Narrowest()
        truth = _run(wide, args, kwargs, gradients, torch.float64, narrowest)
        ours = prepare(copy_of(model))
        try:
            ours64 = _run(copy_of(ours).double(), args, kwargs, gradients, torch.float64)
        except Exception as error:  # a forced backend, or a device, without float64
            notes.append(f"not compared in float64: {type(error).__name__}: {error}")
            formula: tuple[Compared, ...] = ()
        else:
            move = max(_MOVE, 16 * narrowest.step)
            if move > _MOVE:
                notes.append("the original rounds inside, so in float64 no finer than its rounding")
            moved = []
            for _ in range(_MOVES):
                twin = copy_of(wide)
                noise.move([twin], move)
                inputs = noise.moved(args, move), noise.moved(kwargs, move)
                moved.append(_run(twin, *inputs, gradients))
            formula = _compare_formula(ours64, truth, moved)
        given = (*original.parameters(), *(t for _, t in tensors((args, kwargs))))
        if {t.dtype for t in given if t.is_floating_point()} == {torch.float64}:
            return Verification(*_split(formula), notes=tuple(notes))

        plain = prepare(original)

        def draw(truth: _Results) -> tuple[Compared, ...]:
            got, peer = (_run(m, args, kwargs, gradients) for m in (ours, plain))
            found = _compare("", got.outputs, truth.outputs, peer.outputs)
            return found + _compare("grad ", got.gradients, truth.gradients, peer.gradients)

        first = draw(truth)
        broken: dict[str, list[Compared]] = {e.name: [] for e in first if not e.ok and e.allowed}
        means: dict[str, Compared] = {}
        again = broken and all(entry.ok for entry in formula)  # else the answer is known
        for count in range(1, DRAWS + 1 if again else 0):
            noise.move([plain, wide, ours], 8.0)
            for entry in draw(_run(wide, args, kwargs, gradients, torch.float64)):
                if entry.name in broken:
                    broken[entry.name].append(entry)
            means = {name: Compared.mean(draws) for name, draws in broken.items()}
            if count >= 4 and any(not e.times_allowed < _HOPELESS for e in means.values()):
                break
        if means:
            notes.append(f"geometric means of {count} draws of the rounding: {', '.join(means)}")
    entries = [means.get(entry.name, entry) for entry in first]
    return Verification(*_split(entries), formula, notes=tuple(notes))


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
        value = _cast(value, torch.float64)
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


def _compare_formula(
    ours: _Results, truth: _Results, moved: Sequence[_Results]
) -> tuple[Compared, ...]:
    """Both in float64; the bound is what moving the weights and inputs does to the original."""
    found = []
    for kind in ("outputs", "gradients"):
        got, want = getattr(ours, kind), getattr(truth, kind)
        largest = max((_largest(t) for t in want.values()), default=0.0)
        for name in dict.fromkeys([*want, *got]):
            label = f"float64 {'grad ' if kind == 'gradients' else ''}{name}"
            if name not in got or name not in want or got[name].shape != want[name].shape:
                found.append(Compared(label, math.inf, 0.0, 0.0))
                continue
            noise = max(_error(getattr(run, kind)[name], want[name]) for run in moved)
            # Some gradients are zero but for rounding, which is of the size of the others'.
            size = largest if kind == "gradients" else _largest(want[name])
            steps = 64 * rounding_step(torch.float64, size) if size else 0.0
            error = _error(got[name], want[name])
            found.append(Compared(label, error, noise, 16 * noise + steps))
    return tuple(found)


def _error(out: Tensor, truth: Tensor) -> float:
    """The largest error where the truth is finite; of integers, how many differ."""
    if not truth.is_floating_point():
        return (out != truth).sum().item()
    return _largest(out - truth, truth)


def copy_of(model: Module) -> Module:
    """A deep copy without gradients (which deepcopy would take along) on the original's flags.

    torch's ``TransformerDecoderLayer`` puts ReLU before an activation that is a module when it is
    copied (pytorch/pytorch#81832 for the encoder's); here a copy's attributes are the original's.
    """
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in held:
            p.grad = None
        copied = copy.deepcopy(model)
    finally:
        for p, grad in held:
            p.grad = grad
    for module, twin in zip(model.modules(), copied.modules()):
        for name in module._modules.keys() - vars(module).keys():
            vars(twin).pop(name, None)
    return copied


def _make_calm(model: Module) -> bool:
    """Sets every dropout probability that is found to 0; whether the model is in training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name.lower():
                setattr(module, name, 0.0)
    return any(module.training for module in model.modules())


def _repeats(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether two runs from different random states agree."""
    with torch.no_grad():
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(dict(tensors(model(*_cast(args, None), **_cast(kwargs, None)))))
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(runs[0].values(), runs[1].values())
    )


@dataclass
class _Results:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _run(
    model: Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: bool,
    dtype: torch.dtype | None = None,
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> _Results:
    torch.manual_seed(0)
    args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
    wanted: dict[str, Tensor]
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {name: t for name, t in tensors((args, kwargs), "input") if t.requires_grad}
    with watch or contextlib.nullcontext():
        outputs = dict(tensors(model(*args, **kwargs)))
    loss: Any = 0.0
    generator = torch.Generator().manual_seed(7)
    for out in outputs.values():
        if out.is_floating_point() and out.requires_grad:
            # One random cotangent per output, in the rounding of the model's own dtype.
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float32)
            weight = weight.bfloat16().to(out)
            loss = loss + (torch.where(out.isfinite(), out, 0) * weight).sum()
    found: dict[str, Tensor] = {}
    if gradients and isinstance(loss, Tensor) and wanted:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        found = {name: g for name, g in zip(wanted, grads) if g is not None}
    return _Results({name: out.detach() for name, out in outputs.items()}, found)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Inputs anew for each run: detached copies, floating-point ones in ``dtype``."""
    if isinstance(value, Tensor):
        new = value.detach().clone()
        if dtype is not None and new.is_floating_point():
            new = new.to(dtype)
        return new.requires_grad_(value.requires_grad)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return copy.deepcopy(value)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's output (tensors, sequences, mappings, dataclasses), with their path.

    >>> [name for name, _ in tensors({"loss": torch.zeros(()), "states": (torch.zeros(1),)})]
    ['loss', 'states.0']
    """

    def under(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, under(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, under(index))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors(getattr(value, entry.name), under(entry.name))


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
