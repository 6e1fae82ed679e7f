"""Copies of a model and their runs: as the original or as swapped, in one dtype, on inputs that are
the same each time. :mod:`fasttransformer.verify` compares what they give."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class Subject:
    """One copy of the model, in one dtype, that runs as the original or as the swapped model: what
    differs is the classes of its modules."""

    def __init__(self, model: Module) -> None:
        from .patterns import swapped_from

        self.module = copy_of(model)
        self._swapped = [(m, type(m)) for m in self.module.modules() if swapped_from(m)]

    def double(self) -> Subject:
        self.module.double()
        return self

    def original(self) -> Module:
        from .swap import restore

        restore(self.module)
        return self.module

    def swapped(self) -> Module:
        for module, cls in self._swapped:
            module.__class__ = cls
        return self.module

    def reset(self, model: Module) -> None:
        """Gives the copy the values of ``model``'s parameters and buffers again."""
        with torch.no_grad():
            mine, given = ((*m.parameters(), *m.buffers()) for m in (self.module, model))
            for copied, value in zip(mine, given):
                if copied.shape == value.shape:
                    copied.copy_(value)


class Progress:
    """Says on standard error what it takes before it starts, and goes on saying what is done where
    that takes longer than two seconds."""

    def __init__(self, model: Module, gradients: bool, show: bool) -> None:
        self.show, self.start = show, time.monotonic()
        numbers = sum(p.numel() for p in model.parameters())
        # Float64: a copy, the original's gradients and those of one run. Own dtype: copy, two runs.
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        self.bytes = (24 * numbers + 3 * own) if gradients else 8 * numbers + own
        if show and self.bytes >= 2**28:
            self._print(f"takes about {self.bytes / 2**30:.1f} GB more than model and activations")

    def __call__(self, what: str) -> None:
        seconds = time.monotonic() - self.start
        if self.show and seconds > 2.0:
            self._print(f"{seconds:.0f} s: {what}")

    @staticmethod
    def _print(text: str) -> None:
        print(f"verify: {text}", file=sys.stderr, flush=True)


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


def disable_dropout(model: Module) -> bool:
    """Sets every dropout probability that is found to 0; whether the model is in training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name.lower():
                setattr(module, name, 0.0)
    return any(module.training for module in model.modules())


def repeats(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether two runs from different random states agree."""
    with torch.no_grad():
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(dict(tensors(model(*cast(args, None), **cast(kwargs, None)))))
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(runs[0].values(), runs[1].values())
    )


@dataclass
class Results:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run(
    model: Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: bool,
    dtype: torch.dtype | None = None,
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> Results:
    torch.manual_seed(0)
    args, kwargs = cast(args, dtype), cast(kwargs, dtype)
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
    return Results({name: out.detach() for name, out in outputs.items()}, found)


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Inputs anew for each run: detached copies, floating-point ones in ``dtype``."""
    if isinstance(value, Tensor):
        new = value.detach().clone()
        if dtype is not None and new.is_floating_point():
            new = new.to(dtype)
        return new.requires_grad_(value.requires_grad)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast(item, dtype) for item in value)
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
