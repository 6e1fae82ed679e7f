"""The peers that benchmarks set beside ours, each through its own documented call.

Functions here return name → candidate for what is installed; :func:`available` says why the others
are missing. torch.compile and FlexAttention compile for seconds to minutes a shape: cases ask for
them where it is worth that, not with ``--quick``. What needs a GPU is in gpu.py.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttransformer.benchmarks._shared import Candidate

#: What only a GPU runs, and the module that it comes in.
GPU_ONLY = {
    "sdpa efficient": None, "sdpa cuDNN": None, "Liger": "liger_kernel", "quack": "quack",
    "flash-attn": "flash_attn", "xformers": "xformers",
}  # fmt: skip


def available() -> dict[str, str | None]:
    """Each peer: None where it can be used here, or why it can't."""
    found: dict[str, str | None] = {"torch eager": None, "torch sdpa": None}
    found["oneDNN packed"] = (
        None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"
    )
    compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
    found["torch.compile"] = None if compiler else "no C++ compiler"
    found["FlexAttention"] = found["torch.compile"]
    lacking = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    found["onnxruntime"] = f"{' and '.join(lacking)} not installed" if lacking else None
    for name, module in GPU_ONLY.items():
        if not torch.cuda.is_available():
            found[name] = "needs a GPU"
        elif module is not None and importlib.util.find_spec(module) is None:
            found[name] = f"{module} not installed"
    return found


def usable(name: str) -> bool:
    return available().get(name) is None


# ---- torch --------------------------------------------------------------------------------------


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Attention as one writes it: scores, softmax, product, each a tensor."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -float("inf"))
    return torch.softmax(scores, -1) @ value


def with_backend(backend: SDPBackend, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` with torch's SDPA held to one of its backends."""

    def call(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return function(*inputs)

    return call


def attention(is_causal: bool, grouped: bool) -> dict[str, Callable[..., Tensor]]:
    """name → function of (query, key, value[, bias]): torch's own ways to attention."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=is_causal, enable_gqa=grouped
        )

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return eager_attention(q, k, v, is_causal, bias)

    return {
        "torch sdpa": sdpa,
        "sdpa math": with_backend(SDPBackend.MATH, sdpa),
        "torch eager": eager,
    }


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, once per process.

    For each of its shapes and dtypes: by itself it would go on uncompiled after eight of them.
    """
    from torch._dynamo import config

    config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Candidate | None:
    """FlexAttention, compiled, as its documentation has it; None where it is not to be had."""
    if not usable("FlexAttention"):
        return None
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = None
    if is_causal:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, query.shape[2], key.shape[2],
            device=query.device.type,
        )  # fmt: skip
    call = compiled(flex)
    grouped = query.shape[1] != key.shape[1]

    def run() -> Tensor:
        with torch.no_grad():
            return call(query, key, value, block_mask=mask, enable_gqa=grouped)

    return run


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Candidate | None:
    """oneDNN with the weight packed beforehand and the residual fused: torch's fastest path."""
    if not usable("oneDNN packed") or x.dtype == torch.float16:
        return None
    packed = weight.to_mkldnn()
    call = torch.ops.mkldnn._linear_pointwise.binary
    return lambda: call(x, residual, packed, bias, "add")


# ---- onnxruntime --------------------------------------------------------------------------------


def onnx_session(model: bytes | str) -> Any:
    """A session on as many threads as torch's. They don't spin while they wait: they would take the
    cores from whoever's turn is next."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx(
    op: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, tuple[int, ...]],
    *,
    domain: str = "",
    **attributes: Any,
) -> Candidate | None:
    """One operator as a model of onnxruntime, float32 on the CPU, its tensors bound in place.

    None where onnxruntime is missing or the dtype is another. An output with an empty name is not
    asked for.
    """
    tensors = list(inputs.values())
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    if not usable("onnxruntime") or not plain:
        return None
    import numpy
    from onnx import TensorProto, helper

    def described(name: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    named = {name: shape for name, shape in outputs.items() if shape}
    node = helper.make_node(
        op, list(inputs), [n if n in named else "" for n in outputs], domain=domain, **attributes
    )
    graph = helper.make_graph(
        [node],
        op,
        [described(name, x.shape) for name, x in inputs.items()],
        [described(name, shape) for name, shape in named.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnx_session(model.SerializeToString())
    binding = session.io_binding()
    results = [torch.empty(shape) for shape in named.values()]
    for name, x in zip(inputs, tensors):
        binding.bind_input(name, "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())
    for name, x in zip(named, results):
        binding.bind_output(name, "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())

    def run() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return results

    run.inputs = tensors  # type: ignore[attr-defined]  # they live as long as the binding
    return run


def onnx_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Candidate | None:
    """onnxruntime's MultiHeadAttention (contrib operator) on (batch, length, heads · head_dim)."""
    batch, heads, length, dim = query.shape
    if key.shape[1] != heads:
        return None
    joined = {
        name: x.transpose(1, 2).reshape(batch, x.shape[2], heads * dim)
        for name, x in {"query": query, "key": key, "value": value}.items()
    }
    run = onnx(
        "MultiHeadAttention", joined, {"output": (batch, length, heads * dim)},
        domain="com.microsoft", num_heads=heads, unidirectional=int(is_causal),
    )  # fmt: skip
    if run is None:
        return None
    return lambda: run()[0].view(batch, length, heads, dim).transpose(1, 2)  # type: ignore[index]


def onnx_softmax(x: Tensor) -> Candidate | None:
    return onnx("Softmax", {"x": x}, {"y": tuple(x.shape)}, axis=-1)


def onnx_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Candidate | None:
    return onnx(
        "LayerNormalization", {"x": x, "w": weight, "b": bias}, {"y": tuple(x.shape)},
        axis=-1, epsilon=eps,
    )  # fmt: skip


def onnx_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Candidate | None:
    """SkipLayerNormalization (contrib operator): (normed, summed)."""
    shape = tuple(x.shape)
    rows = {"x": x[None], "skip": residual[None], "w": weight, "b": bias}
    outputs = {"y": (1, *shape), "mean": (), "rstd": (), "summed": (1, *shape)}
    return onnx("SkipLayerNormalization", rows, outputs, domain="com.microsoft", epsilon=eps)


def present(**candidates: Candidate | None) -> dict[str, Candidate]:
    """The candidates that are there; names' underscores are spaces."""
    return {name.replace("_", " "): run for name, run in candidates.items() if run is not None}
