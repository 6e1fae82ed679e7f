"""Whether a swapped model computes what the original does, measured against float64.

    max |ours - ref64| <= 2 max |original - ref64| + one rounding step of the dtype

ref64 is the original (a restored copy) in float64, ``original`` the same copy in its own dtype. The
rule holds for every output and for the gradient of every parameter and floating-point input. A
gradient's own error counts as no less than the median relative error of the model's gradients, for
some are right by luck; and one that is zero in exact arithmetic (that of a key projection's bias,
which softmax cancels) is noise in all three runs and is allowed the rounding step of the largest.

A deep model on a few tokens hands one rounding error on to all that follows, so the ratio of two
single errors is a matter of luck (0.2 to 8 for MiniLM against itself on a few words). Where the
first comparison breaks the rule, it is drawn again with all weights moved by a few roundings,
the same in the three copies, and the largest errors over all draws are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

#: A float64 gradient this far below the model's largest is what rounding left of zero.
_ZERO = 2.0**-40
#: Comparisons made before one that does not hold counts as failed.
_DRAWS = 8
#: An error this many times the bound is no matter of luck: no further draw.
_HOPELESS = 30.0


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

    def pooled_with(self, other: Compared | None) -> Compared:
        """The larger of two draws' errors and bounds."""
        if other is None:
            return self
        pairs = zip(dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:])
        return Compared(self.name, *(math.nan if a != a or b != b else max(a, b) for a, b in pairs))


@dataclass(frozen=True)
class Verification:
    """The result of ``report.verify``: ``outputs`` and ``gradients``, each entry with ``name``,
    ``max_error``, ``reference_error``, ``allowed`` and ``ok``; ``problem`` says what kept the
    comparison from being made, and is None otherwise."""

    outputs: tuple[Compared, ...] = ()
    gradients: tuple[Compared, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every output and every gradient is within its bound."""
        entries = self.outputs + self.gradients
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
        """The outputs, and the gradients that come closest to their bound."""

        failed = [g for g in self.gradients if not g.ok]
        passed = (g for g in self.gradients if g.ok)
        worst = sorted(passed, key=lambda g: -g.times_allowed)[:gradients]
        return [*self.outputs, *failed, *worst]

    def __str__(self) -> str:
        if self.problem is not None:
            return f"verify: not compared: {self.problem}"
        good = sum(g.ok for g in self.gradients)
        verdict = "ok" if self.ok else "FAILED"
        lines = [f"verify: {verdict}; {good} of {len(self.gradients)} gradients within bounds"]
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
        original = _copy(model)
        restore(original)
        notes = []
        calm = _make_calm(original)
        if calm and not _repeats(original, args, kwargs):
            calm = False
            notes.append("compared in eval mode: the model draws random numbers in training mode")

        def prepare(module: Module) -> Module:
            _make_calm(module)
            return module if calm else module.eval()

        wide = prepare(_copy(original).double())
        ours = prepare(_copy(model))
        plain = prepare(original)
        pooled: dict[str, Compared] = {}
        for draw in range(_DRAWS):
            if draw:
                _move_weights(plain, wide, ours)
            runs = [_run(m, args, kwargs, gradients) for m in (ours, wide, plain)]
            outputs = _compare("", *(run.outputs for run in runs))
            found = (*outputs, *_compare("grad ", *(run.gradients for run in runs)))
            pooled = {entry.name: entry.pooled_with(pooled.get(entry.name)) for entry in found}
            worst = max((entry.times_allowed for entry in pooled.values()), default=0.0)
            if worst <= 1.0 or not worst < _HOPELESS:
                break
        if draw:
            notes.append(f"the largest errors of {draw + 1} draws of the rounding errors")
    entries = list(pooled.values())
    return Verification(
        tuple(entries[: len(outputs)]), tuple(entries[len(outputs) :]), notes=tuple(notes)
    )


def _move_weights(plain: Module, *others: Module) -> None:
    """Moves every weight by some roundings of its dtype, and the other copies' along with it."""
    with torch.no_grad():
        for p, *rest in zip(plain.parameters(), *(m.parameters() for m in others), strict=True):
            if p.is_floating_point():
                noise = torch.randn(p.shape, device=p.device, dtype=torch.float32)
                p.copy_(p * (1.0 + 8.0 * torch.finfo(p.dtype).eps * noise))
            for other in rest:
                other.copy_(p)


def _copy(model: Module) -> Module:
    """A deep copy without gradients (which deepcopy would take along) on the original's flags."""
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in held:
            p.grad = None
        return copy.deepcopy(model)
    finally:
        for p, grad in held:
            p.grad = grad


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
) -> _Results:
    torch.manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.dtype == torch.float64), None)
    args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
    wanted: dict[str, Tensor]
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {name: t for name, t in tensors((args, kwargs), "input") if t.requires_grad}
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
            floor = 2 * typical * size + _step(ours[name].dtype, largest if name in zero else size)
            if floor > found[name].allowed:
                found[name] = dataclasses.replace(found[name], allowed=floor)
    return tuple(found.values())


def _compared(name: str, ours: Tensor, wide: Tensor, plain: Tensor | None) -> Compared:
    if not wide.is_floating_point():
        other = wide if plain is None else plain
        errors = [(t.to(wide.dtype) != wide).sum().item() for t in (ours, other)]
        return Compared(name, errors[0], errors[1], 2 * errors[1])
    truth = wide.double()
    usable = truth.isfinite()
    peer = truth if plain is None else plain.double()
    error = _max((ours.double() - truth)[usable].abs())
    peer_error = _max((peer - truth)[usable & peer.isfinite()].abs())
    step = _step(ours.dtype, _max(truth[usable].abs()))
    return Compared(name, error, peer_error, 2 * peer_error + step)


def _largest(tensor: Tensor) -> float:
    return _max(tensor[tensor.isfinite()].abs()) if tensor.is_floating_point() else 0.0


def _max(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0


def _step(dtype: torch.dtype, magnitude: float) -> float:
    """The distance between neighbouring numbers of a dtype at a magnitude."""
    if magnitude == 0.0 or not math.isfinite(magnitude):
        return torch.finfo(dtype).tiny
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))
