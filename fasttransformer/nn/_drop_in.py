"""What a class that stands in for one of torch.nn's can't obey, and so refuses in words.

torch's quantizers and TorchScript go by a module's exact class, or by the source of its forward.
Where they would pass over a module of ours in silence, or stop at something inside it, the error
here says what to do first.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Linear, Module


class _QuantizationConfig:
    """``module.qconfig``, which each of torch's quantizers sets on every module before it looks for
    the classes that it quantizes. Ours are none of them: nothing would be quantized, silently.

    A None says "leave it as it is". But dynamic quantization sets it on all modules of a class that
    it does not find in its table, and on nn.Linear itself never.
    """

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Module, value: Any) -> None:
        if value is not None or isinstance(module, Linear):
            raise NotImplementedError(
                f"{_name(module)}: torch's quantizers look for {_torchs(module)} itself and would "
                f"pass over this module: {_order(module, 'quantize')}"
            )
        module.__dict__["qconfig"] = value

    def __delete__(self, module: Module) -> None:
        if "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")
        del module.__dict__["qconfig"]


class DropIn:
    """In front of torch's class in every class of ours that stands in for it."""

    qconfig = _QuantizationConfig()

    def __prepare_scriptable__(self) -> Module:
        """Called by torch.jit.script, of a module that is inside another one too."""
        assert isinstance(self, Module)
        raise NotImplementedError(
            f"{_name(self)}: torch.jit.script can't compile the calls of our kernels (torch.jit."
            f"trace can trace it): {_order(self, 'script')}"
        )


def _source(module: Module) -> type | None:
    return getattr(module, "_ft_swapped_from", None)


def _torchs(module: Module) -> str:
    return (_source(module) or next(c for c in type(module).__mro__ if _is_torchs(c))).__name__


def _is_torchs(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.")


def _name(module: Module) -> str:
    return f"{_torchs(module)}, swapped by ft.swap" if _source(module) else type(module).__name__


def _order(module: Module, verb: str) -> str:
    if _source(module) is not None:
        return f"call ft.restore(model), {verb} the model, and swap what is left afterwards"
    return f"set its __class__ to torch.nn.{_torchs(module)} and {verb} the model then"
