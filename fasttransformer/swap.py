"""Per-instance replacement of a model's modules by this package's, reported and reversible.

>>> import torch, fasttransformer as ft
>>> model = torch.nn.Sequential(torch.nn.Softmax(-1), torch.nn.Flatten())
>>> report = ft.swap(model)
>>> print(report)
swap: 1 module swapped, 0 left alone
  torch.nn.Softmax -> Softmax: 1 (0)
>>> ft.restore(model)
1
>>> type(model[0]) is torch.nn.Softmax
True
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from . import patterns
from .integrations import bert, distilbert  # noqa: F401  (their rows; transformers stays unimported)
from .verify import Verification, verify


@dataclass(frozen=True)
class Swapped:
    """A module whose class was changed: its name in the model, the class before, the class now."""

    name: str
    source: type[Module]
    target: type[Module]


@dataclass(frozen=True)
class Skipped:
    """A module that was left alone, and why."""

    name: str
    source: type[Module]
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`swap` did: ``swapped``, ``skipped`` (each with its reason), ``already``, the
    names of the modules that an earlier swap had changed, and ``without_pattern``, how many modules
    that compute there are of each class that has no pattern."""

    model: Module
    swapped: tuple[Swapped, ...]
    skipped: tuple[Skipped, ...]
    already: tuple[str, ...] = ()
    without_pattern: Mapping[str, int] = field(default_factory=dict)

    def _count(self) -> str:
        count = f"{len(self.swapped)} module{'' if len(self.swapped) == 1 else 's'} swapped"
        return f"{count}, {len(self.skipped)} left alone"

    def __repr__(self) -> str:
        return f"<swap of a {type(self.model).__name__}: {self._count()}; print it for the list>"

    def __str__(self) -> str:
        lines = [f"swap: {self._count()}"]
        groups: dict[str, list[str]] = {}
        for s in self.swapped:
            key = f"{patterns.short_name(s.source)} -> {s.target.__name__}"
            groups.setdefault(key, []).append(s.name)
        lines += [f"  {key}: {len(names)} ({_places(names)})" for key, names in groups.items()]
        if not self.swapped:
            if self.already:
                lines.append(f"  nothing to do: {len(self.already)} swapped before")
            elif not self.skipped:
                lines.append("  nothing to swap: no module of this model has a pattern")
        if self.skipped:
            lines.append("left alone:")
        groups = {}
        for k in self.skipped:
            groups.setdefault(f"{patterns.short_name(k.source)}: {k.reason}", []).append(k.name)
        lines += [f"  {key}: {len(names)} ({_places(names)})" for key, names in groups.items()]
        if self.without_pattern:
            counts = sorted(self.without_pattern.items(), key=lambda item: -item[1])
            lines.append("no pattern for: " + ", ".join(f"{n} {name}" for name, n in counts))
        return "\n".join(lines)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Compares the swapped model's outputs and gradients on these inputs with the original's.

        Two rules: in float64 both must agree to what rounding there explains, so that a wrong
        formula is found in every run; and in the model's own dtype the swapped one's error may be
        at most twice the original's, plus one rounding step. All are run on copies: the model's
        flags, gradients and the random state stay as they are. Dropout is off. Prints a table
        (unless ``show=False``; ``gradients=False`` compares outputs only) and raises nothing: what
        goes wrong is in ``problem``.

        >>> import torch, fasttransformer as ft
        >>> report = ft.swap(torch.nn.Softmax(-1))
        >>> report.verify(torch.zeros(2, 2), show=False).ok
        True
        """
        return verify(self.model, *args, **kwargs)


def _places(names: list[str]) -> str:
    """``encoder.layer.*.output`` for names that differ by numbers only; at most four of them."""
    if len(names) == 1:
        return names[0] or "the model itself"
    places = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))
    shown = [place or "the model itself" for place in places[:4]]
    return ", ".join(shown + (["..."] if len(places) > 4 else []))


def swap(model: Module) -> Report:
    """Replaces the classes of a model's modules by this package's, in place, where that is safe.

    Only ``module.__class__`` changes: parameters, buffers, hooks and attributes stay the same
    objects, and ``state_dict`` keys the same. Covered are torch.nn's LayerNorm, RMSNorm, Softmax,
    Linear (on the CPU), MultiheadAttention and the Transformer layers, and transformers' BERT
    family; see docs/swap.md.
    Any module that the replacement might compute differently is left alone and listed: a subclass
    that is not known, a replaced ``forward``, a hook on a part that would not be called any more,
    a parametrized, quantized or wrapped part. Swapping again changes nothing and says so.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import torch, fasttransformer as ft
    >>> report = ft.swap(torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.RMSNorm(4)))
    >>> [(entry.name, entry.target.__name__) for entry in report.swapped]
    [('1', 'RMSNorm')]
    """
    if not isinstance(model, Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, got {type(model).__name__}")
    chosen: list[tuple[str, Module, patterns.Pattern]] = []
    skipped: list[Skipped] = []
    already: list[str] = []
    for name, module, blocked in _walk(model):
        if patterns.swapped_from(module) is not None:
            already.append(name)
            continue
        pattern = patterns.find(module)
        if pattern is None:
            reason = _unknown(module)
        else:
            reason = blocked or pattern.reason(module)
            if reason is None:
                chosen.append((name, module, pattern))
        if reason is not None:
            skipped.append(Skipped(name, type(module), reason))
    # All reasons are found before the first class changes, so they speak of the model as given.
    swapped = []
    for name, module, pattern in chosen:
        source, target = type(module), pattern.target_class()
        module.__class__ = target
        swapped.append(Swapped(name, source, target))
    skipped += _attention_without_pattern(model)
    listed = {entry.name for entry in skipped}
    without = _without_pattern(m for name, m in model.named_modules() if name not in listed)
    return Report(model, tuple(swapped), tuple(skipped), tuple(already), without)


def restore(model: Module) -> int:
    """Gives every swapped module of a model its class back; returns how many there were.

    Works on copies and on unpickled models too.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import copy, torch, fasttransformer as ft
    >>> model = torch.nn.LayerNorm(4)
    >>> _ = ft.swap(model)
    >>> ft.restore(copy.deepcopy(model)), ft.restore(model), ft.restore(model)
    (1, 1, 0)
    """
    if not isinstance(model, Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    count = 0
    for module in model.modules():
        source = patterns.swapped_from(module)
        if source is not None:
            module.__class__ = source
            count += 1
    return count


def _walk(model: Module) -> Iterator[tuple[str, Module, str | None]]:
    """(name, module, reason to leave everything below alone), each module once."""
    seen: set[int] = set()

    def visit(
        name: str, module: Module, blocked: str | None
    ) -> Iterator[tuple[str, Module, str | None]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module, blocked
        if isinstance(module, torch.jit.ScriptModule):
            return
        if type(module).__name__ == "FullyShardedDataParallel":
            blocked = "it is inside FullyShardedDataParallel; swap before wrapping"
        for child_name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{name}.{child_name}" if name else child_name, child, blocked)

    return visit("", model, None)


def _unknown(module: Module) -> str | None:
    """Why a module whose class has no row is worth a line: it derives from one that has."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if (
        cls.__module__.startswith(("fasttransformer.", "torch.nn.modules."))
        or cls in patterns.PARTS
    ):
        return None
    for base in cls.__mro__[1:]:
        if patterns.path_of(base) in patterns.TABLE:
            if hasattr(module, "parametrizations"):
                return "it is parametrized"
            return f"a subclass of {patterns.short_name(base)} that is not known"
    return None


def _attention_without_pattern(model: Module) -> list[Skipped]:
    """Attention modules that no row speaks of, so that a report names what a model still lacks."""
    found = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Attention") or _has_row(module):
            continue
        parts = (m for m in module.modules() if m is not module)
        if not any("Attention" in type(part).__name__ for part in parts):
            found.append(Skipped(name, type(module), "there is no pattern for this class yet"))
    return found


def _without_pattern(modules: Iterable[Module]) -> dict[str, int]:
    """Class → how many of these compute something and have no row: they hold parameters or buffers
    of their own, or are a model's own feed-forward or rotary embedding."""
    found: dict[str, int] = {}
    for module in modules:
        held = any(p is not None for p in (*module._parameters.values(), *module._buffers.values()))
        named = type(module).__name__.endswith(("MLP", "FeedForward", "RotaryEmbedding"))
        if (held or named) and not (_has_row(module) or isinstance(module, patterns.PARTS)):
            name = patterns.short_name(type(module))
            found[name] = found.get(name, 0) + 1
    return found


def _has_row(module: Module) -> bool:
    return (
        patterns.swapped_from(module) is not None
        or type(module).__module__.startswith("fasttransformer.")
        or patterns.find(module) is not None
        or _unknown(module) is not None
    )
