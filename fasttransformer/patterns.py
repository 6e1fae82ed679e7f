"""The table of what :func:`fasttransformer.swap` replaces: source class → target class, and when.

A swap changes a module's class and nothing else, so a target is a subclass of its source that adds
no state: parameters, buffers, hooks, attributes and ``state_dict`` keys stay where they are. Each
target has ``_ft_swapped_from``, its source, which is all that a restore needs; so a swapped model
survives ``deepcopy`` and ``pickle``, and can be restored in another process. Classes of torch.nn
get their targets here; sources outside torch are named by strings and their targets are made on
first use, so that nothing is imported that the model did not import already.

To add a model family, add rows: see docs/swap.md.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Dropout, Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import nn
from .backends import TABLE as KERNELS
from .backends import forced_backend, unavailable
from .nn._plain import activation_name, addition, oddity, path_of

Reason = Callable[[Module], "str | None"]


@dataclass(frozen=True)
class Pattern:
    """One row: modules of exactly the class ``source`` may become ``target``.

    ``children`` are all submodules by name and kind: a key of :data:`KINDS` or "activation"
    for those whose work the target does itself without calling them, "called" for the others; none
    for a target that sees to it.
    ``accepts`` gives the reason why one module is left alone, or None; ``op`` is the operation that
    the target is made for.
    """

    source: str
    target: str
    op: str
    children: Mapping[str, str] = field(default_factory=dict)
    accepts: Reason | None = None

    def source_class(self) -> type[Module]:
        return _load(self.source)

    def target_class(self) -> type[Module]:
        return _load(self.target)

    def reason(self, module: Module) -> str | None:
        """Why ``module``, which is of the class ``source``, is left alone; None to swap it."""
        if type(module) is not self.source_class():
            return "its class has the name of one that is known, but is another class"
        return (
            own_reason(module)
            or kernel_reason(self.op, module)
            or children_reason(module, self.children)
            or (self.accepts(module) if self.accepts is not None else None)
        )


@functools.cache
def _load(path: str) -> type[Module]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def short_name(cls: type) -> str:
    """``torch.nn.LayerNorm`` rather than the file it is written in; else the class's name."""
    if getattr(torch.nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    return cls.__name__


def long_name(cls: type) -> str:
    """As :func:`short_name`, with the module of a class that is not in torch.nn: many are called
    Linear."""
    short = short_name(cls)
    return short if short.startswith("torch.nn.") else path_of(cls)


def own_code(source: type, function: Any) -> bool:
    """Whether a function, and all that it wraps, is written in the package that ``source`` comes
    from, and so was not put there by someone else."""
    package = sys.modules[source.__module__.partition(".")[0]]
    folder = os.path.dirname(package.__file__ or "")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(folder):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


# ---- reasons to leave a module alone ------------------------------------------------------------


def own_reason(module: Module) -> str | None:
    """What holds for any module: a replaced forward, parameters that are no plain tensors."""
    if "forward" in module.__dict__:
        return "its forward is replaced on this instance"
    if not own_code(type(module), type(module).forward):
        return f"the forward of {short_name(type(module))} is replaced"
    if module.__dict__.get("qconfig") is not None:
        return "it is prepared for quantization; convert the model, then swap"
    return _parameter_reason(module, "")


def _parameter_reason(module: Module, prefix: str) -> str | None:
    for name, parameter in module._parameters.items():
        found = None if parameter is None else oddity(parameter)
        if found is not None:
            return f"{prefix}{name} {found}"
    if "weight" not in module._parameters and isinstance(module, _WEIGHTED):
        return f"{prefix}weight is computed by a hook (pruning or weight normalization)"
    return None


def _bypass_reason(child: Module, name: str) -> str | None:
    """What a submodule has that a target which reads its parameters would pass over."""
    reason = _parameter_reason(child, f"{name}.")
    if reason is None:
        added = addition(child)
        reason = None if added is None else f"{name} {added}, which would not be called"
    return reason


def kernel_reason(op: str, module: Module) -> str | None:
    """The reason when the C++ library, which alone is faster than torch on a CPU, is missing."""
    if forced_backend() is not None or unavailable("cpu") is None:
        return None
    tensor = next(module.parameters(), None)
    if tensor is not None and tensor.device.type == "cpu":
        return f"no faster {op} runs on this CPU: {unavailable('cpu')}"
    return None


def linear_is_faster(module: Module) -> str | None:
    """The one rule for plain linear layers: ours is the faster one on the CPU, cuBLAS on a GPU."""
    device = module._parameters["weight"].device.type  # type: ignore[union-attr]
    if device not in ("cpu", "meta"):
        return f"torch's own matmul is the faster one on {device}"
    if KERNELS["linear_add"]["cpu"].forward is None and forced_backend() is None:
        return "linear_add has no CPU kernel in this build"
    return None


def children_reason(module: Module, kinds: Mapping[str, str]) -> str | None:
    """Why the submodules can't be bypassed: another class, a hook, more of them than known."""
    if not kinds:
        return None
    for name, child in module._modules.items():
        if child is None:
            continue
        kind = kinds.get(name)
        if kind is None:
            return f"it has a submodule that is not known: {name} ({short_name(type(child))})"
        if kind == "called":
            continue
        if kind != "activation" and type(child) not in KINDS[kind]:
            return (
                f"its part {name} is not torch.nn.{kind} itself but a {long_name(type(child))}, "
                "which has to be called"
            )
        problem = _bypass_reason(child, name)
        if problem is not None:
            return problem
        if kind == "activation" and activation_name(child) is None:
            return f"its activation, {short_name(type(child))}, has no kernel"
    for name, kind in kinds.items():
        if kind in KINDS and module._modules.get(name) is None:
            return f"it has no submodule {name}"
    return None


# ---- torch.nn -----------------------------------------------------------------------------------


def _softmax_accepts(module: Module) -> str | None:
    return "dim is None, which torch guesses from the input" if module.dim is None else None


def _attention_accepts(module: Module) -> str | None:
    out = module._modules.get("out_proj")
    if type(out) is not NonDynamicallyQuantizableLinear:
        return f"out_proj is a {short_name(type(out))}"
    return _parameter_reason(out, "out_proj.")


def _layer_accepts(module: Module) -> str | None:
    """A layer is one fused computation: no part of it may hold more than torch put there."""
    for name, child in module.named_modules():
        if not name:
            continue
        known = type(child) in _LAYER_PARTS or activation_name(child) is not None
        if not known and not name.endswith("activation"):
            return f"{name} is a {short_name(type(child))}"
        problem = _bypass_reason(child, name)
        if problem is not None:
            return problem
    return None


def _stack_accepts(module: Module) -> str | None:
    for name, child in module._modules["layers"].named_children():  # type: ignore[union-attr]
        if type(child) not in _LAYERS:
            return f"layers.{name} is a {short_name(type(child))}"
    return None


#: class name in torch.nn (and in fasttransformer.nn) → operation, and when it is accepted.
_TORCH: dict[str, tuple[str, Reason | None]] = {
    "LayerNorm": ("layer_norm", None),
    "RMSNorm": ("rms_norm", None),
    "Softmax": ("softmax", _softmax_accepts),
    "Linear": ("linear_add", linear_is_faster),
    "MultiheadAttention": ("attention", _attention_accepts),
    "TransformerEncoderLayer": ("attention", _layer_accepts),
    "TransformerDecoderLayer": ("attention", _layer_accepts),
    "TransformerEncoder": ("attention", _stack_accepts),
    "TransformerDecoder": ("attention", _stack_accepts),
}

#: source class path → pattern
TABLE: dict[str, Pattern] = {}


def add(pattern: Pattern) -> None:
    TABLE[pattern.source] = pattern


def _add_torch_classes() -> None:
    for name, (op, accepts) in _TORCH.items():
        ours, torchs = getattr(nn, name, None), getattr(torch.nn, name)
        if ours is None:
            continue
        globals()[name] = type(
            name,
            (ours,),
            {
                "__module__": __name__,
                "__qualname__": name,
                "__doc__": f"A torch.nn.{name} that was swapped for fasttransformer.nn.{name}.",
                "_ft_swapped_from": torchs,
            },
        )
        add(Pattern(path_of(torchs), f"{__name__}.{name}", op, accepts=accepts))


_add_torch_classes()


def _kinds(name: str) -> tuple[type[Module], ...]:
    """torch's class, ours, and the swapped one."""
    found = [getattr(torch.nn, name)]
    if hasattr(nn, name):
        found += [getattr(nn, name), globals()[name]]
    return tuple(found)


#: kind of a child → the classes whose forward a target knows
KINDS: dict[str, tuple[type[Module], ...]] = {
    "Linear": _kinds("Linear"),
    "LayerNorm": _kinds("LayerNorm"),
    "Dropout": (Dropout,),
}
_WEIGHTED = (torch.nn.Linear,)
_LAYERS = _kinds("TransformerEncoderLayer") + _kinds("TransformerDecoderLayer")
_LAYER_PARTS = frozenset(
    _kinds("Linear")
    + _kinds("LayerNorm")
    + _kinds("MultiheadAttention")
    + (Dropout, NonDynamicallyQuantizableLinear)
)
#: Subclasses of a source that are a part of a source themselves: nothing to report.
PARTS: tuple[type[Module], ...] = (NonDynamicallyQuantizableLinear,)


def find(module: Module) -> Pattern | None:
    """The row for a module's exact class, or None."""
    return TABLE.get(path_of(type(module)))


def swapped_from(module: Module) -> type[Module] | None:
    """The class that a swapped module had before, None for a module that was not swapped.

    Parametrizations and ``fully_shard`` derive a class of their own from a module's: they stay, on
    the class that it had before.
    """
    return _class_before(type(module))  # type: ignore[arg-type]


@functools.cache
def _class_before(cls: Any) -> Any:
    source = cls.__dict__.get("_ft_swapped_from")
    if source is not None or not hasattr(cls, "_ft_swapped_from"):
        return source
    bases = tuple(_class_before(base) or base for base in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def targets(
    namespace: dict[str, Any], rows: Iterable[tuple[Pattern, type]]
) -> Callable[[str], type[Module]]:
    """A module's ``__getattr__`` that makes the target classes of ``rows`` on first use (PEP 562).

    Each row is a pattern, added to the table here, and the mixin that goes in front of its source.
    The class is kept in ``namespace``, under the name that ``pickle`` looks for.
    """
    known = {}
    for pattern, mixin in rows:
        add(pattern)
        known[pattern.target.rpartition(".")[2]] = pattern, mixin

    def make(name: str) -> type[Module]:
        if name not in known:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        pattern, mixin = known[name]
        source = pattern.source_class()
        namespace[name] = type(
            name,
            (mixin, source),
            {
                "__module__": namespace["__name__"],
                "__qualname__": name,
                "__doc__": f"A {pattern.source} that was swapped.",
                "_ft_swapped_from": source,
            },
        )
        return namespace[name]

    return make
