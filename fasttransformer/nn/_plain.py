"""Which calls our kernels may take, asked in one place: of a module's tensors, and of its parts.

Two questions. A drop-in module asks whether it must run torch's own forward for these inputs
(:func:`kernels_take`, then :func:`run_torchs`, which notes why): a tensor subclass (DTensor, a
jagged tensor, a quantized weight), a sparse or nested layout, a dtype that kernels don't have,
tracing by torch.jit, torch.fx or an ONNX exporter. A fused forward asks of each part whose
parameters it reads instead of calling it whether there is more to that part (:func:`addition`).
Every target of :func:`fasttransformer.swap` uses both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import GELU, Module, Parameter, ReLU, SiLU
from torch.nn.modules.module import _has_any_global_hook

from ..ops._front import FLOATS
from ._fallback import record

_SOURCES = (
    torch.nn.Embedding,
    torch.nn.LayerNorm,
    torch.nn.Linear,
    torch.nn.MultiheadAttention,
    torch.nn.RMSNorm,
    torch.nn.Softmax,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
)
#: What stands for a tensor while torch.compile and torch.export trace our operators.
_TRACED = frozenset({FakeTensor, FunctionalTensor})
_PLAIN = frozenset({Tensor, Parameter}) | _TRACED
_FLOATS = frozenset(FLOATS)
_STRIDED = torch.strided
#: torch's own forwards: somebody may put another one on a class later.
_FORWARDS = {cls: cls.forward for cls in _SOURCES}
_jit_tracing = torch._C._get_tracing_state


def kernels_take(source: type | None, input: Tensor, *others: Tensor | None) -> bool:
    """Whether our kernels may compute with these tensors, the first of which is floating point, in
    place of the forward of ``source``, torch's class.

    If not, :func:`run_torchs` runs torch's forward. Takes 0.5 µs for three tensors.
    """
    kind = type(input)
    if (
        (source is not None and source.forward is not _FORWARDS[source])  # type: ignore
        or _jit_tracing() is not None
        or kind not in _PLAIN
        or input.dtype not in _FLOATS
        or input.layout is not _STRIDED
        or input.is_nested
        or (kind in _TRACED and torch.onnx.is_in_onnx_export())
    ):
        return False
    for x in others:
        if x is not None and (type(x) not in _PLAIN or x.layout is not _STRIDED):
            return False
    return True


def run_torchs(module: Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's own ``forward`` of ``module`` for inputs that :func:`kernels_take` turns down.

    torch.fx gets the call as one node, which is what it does with a module of torch.nn.
    """
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    proxies = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.fx.Proxy)]
    if proxies:
        return _fx_node(module, forward, proxies[0].tracer, args, kwargs)
    given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    record(module, _why(module, given))
    return forward(*args, **kwargs)


def _fx_node(
    module: Module, forward: Callable[..., Any], tracer: Any, args: tuple, kwargs: dict[str, Any]
) -> Any:
    hooked = addition(module)
    if hooked is None:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
    # The node would run the hooks, which torch.fx is recording at this moment, once more.
    try:
        return forward(*args, **kwargs)
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise NotImplementedError(
            f"torch.fx can't trace {type(module).__name__}, which {hooked} and was swapped: call "
            "ft.restore(model), trace, and swap the traced model"
        ) from error


def _why(module: Module, given: Mapping[str, Any]) -> str:
    """What :func:`kernels_take` saw, in words."""
    if torch.onnx.is_in_onnx_export():
        return "an ONNX export"
    if _jit_tracing() is not None:
        return "torch.jit.trace"
    named = {**given, **dict(module.named_parameters())}
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        found = _no_plain_tensor(x)
        if found is not None:
            return f"{name} {found}"
    # The dtype of the parameters first: an input may be of integers, if it is an index or a mask.
    for name, x in reversed(tensors.items()):
        if x.dtype not in _FLOATS:
            return f"{name} has dtype {x.dtype}"
    return "the forward of torch's class is replaced, or it is not called with tensors"


def oddity(x: Tensor) -> str | None:
    """What makes a parameter none that kernels read, in words, or None."""
    return _no_plain_tensor(x) or (None if x.dtype in _FLOATS else f"has dtype {x.dtype}")


def _no_plain_tensor(x: Tensor) -> str | None:
    if x.is_nested:
        return "is a nested tensor"
    if type(x) not in _PLAIN:
        return f"is a {type(x).__name__}"
    if x.layout is not _STRIDED:
        return f"has layout {x.layout}"
    return None


def addition(module: Module) -> str | None:
    """What this very instance has that its class's forward does not do, in words, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has a hook"
    if "forward" in module.__dict__:
        return "has a replaced forward"
    return odd_parameter(module)


def odd_parameter(module: Module) -> str | None:
    """Which parameter of a module is no plain tensor, in words, or None."""
    for x in module._parameters.values():
        if x is not None and (
            (type(x) is not Parameter and type(x) not in _PLAIN) or x.layout is not _STRIDED
        ):
            name = next(name for name, y in module._parameters.items() if y is x)
            return f"has a {name} that {_no_plain_tensor(x)}"
    return None


_OF_PARTS = (
    torch.nn.LayerNorm,
    torch.nn.Linear,
    torch.nn.MultiheadAttention,
    torch.nn.RMSNorm,
)


def called_everywhere() -> str | None:
    """Why every part must be called at present, whatever it is, in words, or None."""
    if _has_any_global_hook():
        return "global module hooks"
    for cls in _OF_PARTS:
        if cls.forward is not _FORWARDS[cls]:
            return f"the forward of torch.nn.{cls.__name__} is replaced"
    return None


def part_reason(part: Any, forwards: tuple[Callable[..., Any], ...]) -> str | None:
    """Why a part must be called, rather than its parameters read, in words; None if there is no
    more to it than its parameters and one of ``forwards``. See :func:`called_everywhere`, too."""
    if getattr(type(part), "forward", None) not in forwards:
        return f"is a {type(part).__name__}"
    return addition(part)


def plain_part(part: Module, forwards: tuple[Callable[..., Any], ...]) -> bool:
    return part_reason(part, forwards) is None and called_everywhere() is None


def parameter(module: Module, name: str) -> Any:
    """``module.name``, in a tenth of the time where it is a parameter (and it may be computed: by
    pruning, weight normalization or a parametrization)."""
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: What ``linear_add(activation=)`` calls the functions and module classes that people use; classes
#: of transformers by their path, so that it need not be there.
_ACTIVATIONS: dict[object, str] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    ReLU: "relu",
    SiLU: "silu",
}
_ACTIVATION_PATHS = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(activation: object) -> str | None:
    """``linear_add``'s name for an activation given as a function or module, None if it has none.

    >>> activation_name(GELU(approximate="tanh"))
    'gelu_tanh'
    """
    if not isinstance(activation, Module):
        try:
            return _ACTIVATIONS.get(activation)
        except TypeError:  # not hashable
            return None
    if addition(activation) is not None:
        return None
    cls = type(activation)
    if cls is GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    function = activation.__dict__.get("act", F.gelu)  # what some of transformers' classes call
    function = getattr(function, "func", function)
    if function is not F.gelu and getattr(function, "__self__", None) is not activation:
        return None
    return _ACTIVATIONS.get(cls) or _ACTIVATION_PATHS.get(path_of(cls))
