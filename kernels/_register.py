"""How a Python function becomes the operator ``fasttransformer_triton::<name>``.

The schema comes from the function's annotations, so it is written once. The function is put into
torch's dispatcher as it is (torch.library.Library), which costs about 3 µs a call;
torch.library.custom_op wraps it in checks that cost 10. Fake kernels are registered by the fronts
(fasttransformer/ops), for this namespace and for the C++ one alike, and there is no autograd here:
forward and backward are two operators, joined by the fronts. Under torch.compile each is one
opaque node.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fasttransformer_triton"

#: Dispatch keys that the operators run on. ROCm's devices use the CUDA key too.
KEYS = ("CUDA", "XPU") + (("CPU",) if os.environ.get("TRITON_INTERPRET") == "1" else ())

_library = torch.library.Library(NAMESPACE, "DEF")


def schema_of(function: Callable[..., Any], returns: tuple[str, ...]) -> str:
    """``name(arguments) -> results``, as it would stand in csrc/registration.cpp."""
    inferred = torch.library.infer_schema(function, mutates_args=())
    arguments = inferred.rpartition(" -> ")[0].replace("SymInt", "int")
    results = f"({', '.join(f'Tensor {name}' for name in returns)})" if returns else "Tensor"
    return f"{function.__name__}{arguments} -> {results}"


def operator(*returns: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of tensors as an operator; ``returns`` names its results if several."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema_of(function, returns), tags=(torch.Tag.pt2_compliant_tag,))
        for key in KEYS:
            _library.impl(
                function.__name__, function if key == "CPU" else _on_its_device(function), key
            )
        return function

    return register


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; this makes it the first argument's."""

    @functools.wraps(function)
    def on_its_device(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        index = first.get_device()
        if index == torch.accelerator.current_device_index():
            return function(first, *args, **kwargs)
        with torch.accelerator.device_index(index):
            return function(first, *args, **kwargs)

    return on_its_device
