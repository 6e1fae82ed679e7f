"""A swapped model obeys what is done to it, as the original does, or says what to do first.

Tracers and exporters, other kinds of tensors, quantizers, hooks and whatever replaces a part: each
test does the same to a model and to its swapped twin.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings

import pytest
import torch
from swap_model import MODELS, D, Net, close, ids, reasons_of, twins
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fasttransformer as ft
from fasttransformer.patterns import swapped_from

# ---- tracers and exporters ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_b94_torch_fx_sees_one_node(kind):
    """b94 (pytorch#44802): symbolic_trace walks into a class that replaced a torch.nn module."""
    original, swapped = twins(kind)
    x = torch.randn(2, 5, D)
    graph = torch.fx.symbolic_trace(swapped)
    want = torch.fx.symbolic_trace(original)
    assert [n.op for n in graph.graph.nodes] == [n.op for n in want.graph.nodes]
    close(graph(x), original(x))
    assert any(swapped_from(m) for m in graph.modules())
    ft.restore(graph)
    assert torch.equal(graph(x), want(x))


def test_torch_fx_runs_hooks_once_or_refuses():
    x = torch.randn(2, 5, D)
    for kind in ("Linear", "TransformerEncoderLayer"):
        original, swapped = twins(kind)
        for model in (original, swapped):
            model[0].register_forward_hook(lambda module, args, out: out + 1)
        if kind == "Linear":
            close(torch.fx.symbolic_trace(swapped)(x), original(x))
        else:
            with pytest.raises(NotImplementedError, match=r"ft\.restore\(model\), trace"):
                torch.fx.symbolic_trace(swapped)


@pytest.mark.parametrize("grads", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", MODELS)
def test_b95_torch_jit_trace(kind, grads):
    """b95 (state-spaces/mamba#79): torch.jit.trace can't keep a Python autograd.Function."""
    original, swapped = twins(kind)
    if grads:
        original.train(), swapped.train()  # as torch traces its layers: not on their fast path
    with torch.set_grad_enabled(grads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(swapped, torch.randn(2, 5, D), check_trace=False)
    assert reasons_of(swapped) == {"torch.jit.trace"}
    assert "fasttransformer::" not in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for shape in ((2, 5, D), (3, 5, D)):
        x = torch.randn(shape)
        close(loaded(x), original(x))


@pytest.mark.parametrize("kind", MODELS)
def test_torch_jit_script_says_restore_first(kind):
    original, swapped = twins(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotImplementedError, match=r"ft\.restore\(model\), script the model"):
            torch.jit.script(swapped)
        ft.restore(swapped)
        x = torch.randn(2, 5, D)
        close(torch.jit.script(swapped)(x), original(x))


def onnx_output(model, x, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(buffer)
        else:
            torch.onnx.export(model, (x,), buffer, dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", MODELS)
def test_b96_onnx(kind, dynamo):
    """b96 (TensorRT-LLM#2368): the exporters stop at a fused operator that they do not know."""
    if dynamo and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("no onnxscript")
    original, swapped = twins(kind)
    x = torch.randn(2, 5, D)
    try:
        want = onnx_output(original, x, dynamo)
    except Exception as error:  # the older exporter has no encoder layer in eval mode, nor RMSNorm
        with pytest.raises(type(error)):
            onnx_output(swapped, x, dynamo)
        assert not dynamo
        return
    close(onnx_output(swapped, x, dynamo), want)
    assert reasons_of(swapped) <= {"an ONNX export", "torch.jit.trace"}


def test_torch_export_still_takes_our_operators():
    """What an ONNX export changes ends with it."""
    _, swapped = twins("TransformerEncoderLayer")
    program = torch.export.export(swapped, (torch.randn(2, 5, D),))
    assert "fasttransformer" in str(program.graph)
    assert not ft.nn.fallbacks(swapped)


# ---- tensors that kernels don't read ------------------------------------------------------------


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)], layout=layout)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.parametrize("kind", ["Linear", "LayerNorm", "RMSNorm", "Softmax"])
def test_b99_nested_tensors(kind, layout):
    """b99 (pytorch#130538): nested tensors in a model whose layers were replaced."""
    original, swapped = twins(kind)
    x = nested(layout)
    try:
        want = original(x)
    except Exception as error:  # torch has no RMSNorm of strided nested tensors
        with pytest.raises(type(error)):
            swapped(x)
        return
    got = swapped(x)
    assert type(got) is type(want) and got.is_nested
    for a, b in zip(got.unbind(), want.unbind(), strict=True):
        close(a, b)
    assert reasons_of(swapped) == {f"{'x' if kind == 'RMSNorm' else 'input'} is a nested tensor"}


def test_b99_nested_ids():
    ours = ft.nn.Embedding(7, 4)
    x = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    want = nn.functional.embedding(torch.arange(5), ours.weight)
    close(ours(x).unbind()[1], want)


class Marked(torch.Tensor):
    """A subclass that does nothing, and says so in the result's class."""


@pytest.mark.parametrize("kind", MODELS)
def test_subclasses_of_tensor_stay_subclasses(kind):
    original, swapped = twins(kind)
    x = torch.randn(2, 5, D).as_subclass(Marked)
    got, want = swapped(x), original(x)
    assert type(got) is type(want) is Marked
    close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


class Doubling(torch.Tensor):
    """A weight that is twice what it holds wherever a linear layer uses it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        if function is torch.Tensor.detach:  # so that it can be a parameter
            return out.as_subclass(cls)
        if function in (nn.functional.linear, nn.functional.multi_head_attention_forward):
            return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
        return out


@pytest.mark.parametrize(
    ("kind", "part"),
    [("Linear", "0"), ("TransformerEncoderLayer", "0.linear1"), ("TransformerEncoderLayer",
     "0.linear2"), ("TransformerEncoderLayer", "0.self_attn.out_proj"),
     ("MultiheadAttention", "0.attention.out_proj")],
)  # fmt: skip
def test_a_weight_that_becomes_a_subclass_after_the_swap(kind, part):
    """What torchao's quantize_ does to isinstance(m, nn.Linear), and distribute_module."""
    original, swapped = twins(kind)
    original.train(), swapped.train()
    for model in (original, swapped):
        linear = model.get_submodule(part)
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubling))
    x = torch.randn(2, 5, D)
    plain = twins(kind)[0].train()
    assert not torch.allclose(original(x), plain(x), atol=1e-3)
    close(swapped(x), original(x))
    assert any("Doubling" in reason for reason in reasons_of(swapped))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64], ids=str)
def test_b101_other_dtypes(dtype):
    """b101 (pytorch PR #178799): a linear layer of complex numbers, or of integers."""
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.arange(6).view(2, 3).to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(torch.arange(2).to(dtype), requires_grad=False)
    x = torch.arange(12).view(4, 3).to(dtype)
    want = layer(x)
    (entry,) = ft.swap(layer).skipped
    assert entry.reason == f"weight has dtype {dtype}"
    layer.__class__ = ft.nn.Linear
    assert torch.equal(layer(x), want)
    assert reasons_of(layer) == {f"bias has dtype {dtype}"}


def test_b101_cast_to_complex_after_the_swap():
    original, swapped = twins("Linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original.to(torch.complex64), swapped.to(torch.complex64)
    x = torch.randn(2, D, dtype=torch.complex64)
    close(swapped(x), original(x))


@pytest.mark.parametrize("part", ["0", "0.linear1"])
def test_sparse_weights(part):
    original, swapped = twins("Linear" if part == "0" else "TransformerEncoderLayer")
    original.train(), swapped.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (original, swapped):
            linear = model.get_submodule(part)
            linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr())
        x = torch.randn(5, D)
        with torch.no_grad():
            close(swapped(x), original(x))
    assert any("sparse" in reason for reason in reasons_of(swapped))
    if part == "0":
        ft.restore(swapped)
        (entry,) = ft.swap(swapped).skipped
        assert entry.reason == "weight has layout torch.sparse_csr"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_after_the_swap(dtype):
    original, swapped = twins("TransformerEncoderLayer")
    x = torch.randn(2, 5, D)
    got = swapped.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and not ft.nn.fallbacks(swapped)
    assert torch.allclose(got.float(), original(x), atol=0.05)


# ---- quantizers ---------------------------------------------------------------------------------


def quantizable():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.LayerNorm(D), nn.Linear(D, D)).eval()


def prepare(model):
    model.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(model)


def prepare_fx(model):
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    return prepare_fx(model, mapping, (torch.randn(2, D),))


def quantize_dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantize", [quantize_dynamic, prepare, prepare_fx])
def test_b103_quantizers_refuse_a_swapped_model(quantize):
    """b103 (AutoGPTQ#704): a quantizer that looks for nn.Linear passes over subclasses."""
    model = quantizable()
    ft.swap(model)
    with pytest.raises(NotImplementedError, match=r"Linear, swapped by ft.*ft\.restore\(model\)"):
        quantize(model)
    ours = nn.Sequential(ft.nn.Linear(D, D))
    with pytest.raises(NotImplementedError, match=r"set its __class__ to torch\.nn\.Linear"):
        quantize(ours)
    assert "qconfig" not in vars(ours[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_b103_quantized_first_then_swapped():
    original = quantizable()
    model = quantize_dynamic(original)
    x = torch.randn(3, D)
    want = model(x)
    report = ft.swap(model)
    assert [s.name for s in report.swapped] == ["2"]
    assert "quantized" in type(model[0]).__module__ and "quantized" in type(model[3]).__module__
    close(model(x), want)
    # A quantizer of what is not ours goes on: no Linear is left, and a None is no request.
    torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    ft.restore(model)
    assert torch.equal(model(x), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_b103_a_prepared_model_is_left_alone():
    """Between prepare and convert: converting looks for the class, too."""
    model = prepare(quantizable())
    report = ft.swap(model)
    assert not report.swapped
    assert {s.reason for s in report.skipped} == {
        "it is prepared for quantization; convert the model, then swap"
    }
    model(torch.randn(3, D))
    converted = torch.ao.quantization.convert(model)
    assert "quantized" in type(converted[0]).__module__


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="no torchao")
@pytest.mark.parametrize("order", ["swap first", "quantize first"])
def test_b103_torchao(order):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    original = quantizable()
    model = copy.deepcopy(original)
    if order == "swap first":
        ft.swap(model)
    quantize_(model, Int8WeightOnlyConfig())
    quantize_(original, Int8WeightOnlyConfig())
    if order == "quantize first":
        ft.swap(model)
    x = torch.randn(3, D)
    assert type(model[0].weight) is type(original[0].weight) is not nn.Parameter
    close(model(x), original(x))


# ---- counting ----------------------------------------------------------------------------------


def test_the_plain_path_stays_ours():
    """None of the questions above turns a plain call away."""
    model = Net().eval()
    ft.swap(model)
    model(ids())
    with torch.inference_mode():
        model(ids())
    torch.func.functional_call(model, dict(model.named_parameters()), (ids(),))
    assert not ft.nn.fallbacks(model)
    graphs = []  # where fallbacks are not counted

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(ids())
    for operator in ("linear_add", "layer_norm", "rms_norm", "softmax", "attention"):
        assert f"torch.ops.fasttransformer.{operator}" in graphs[0]
    assert "torch.nn.functional.layer_norm" not in graphs[0] and "_C._nn.linear" not in graphs[0]


def flops(model, *args, backward=False):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        out = model(*args)
        if backward:
            out.square().sum().backward()
    return counted.get_total_flops()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", ["Linear", "MultiheadAttention", "TransformerEncoderLayer"])
def test_f18_flops_are_counted(kind, backward):
    """f18: FlopCounterMode counts 0 for operators that it has no formula for."""
    original, swapped = twins(kind)
    original.train(), swapped.train()
    x = torch.randn(3, 5, D, requires_grad=True)
    theirs, ours = (flops(model, x, backward=backward) for model in (original, swapped))
    # Backward, torch counts the scores again where attention is one operator, as ours is.
    scores = 2 * 3 * 5 * 5 * D if backward and kind != "Linear" else 0
    assert ours == theirs + scores > 0


def test_flops_of_every_operator_with_a_product():
    heads = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7)]
    packed = [x.transpose(1, 2).flatten(0, 1) for x in heads]
    cu = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7)]
    x, w, target = torch.randn(4, 6), torch.randn(9, 6), torch.arange(4)
    product, attention = 2 * 4 * 6 * 9, 2 * 2 * 3 * 5 * 7 * (8 + 8)
    cache = ft.KVCache.allocate(layers=1, batch=2, heads=3, capacity=16, head_dim=8)
    new = torch.randn(3, 2, 3, 4, 8)
    assert flops(lambda: ft.linear_softmax(x, w)) == product
    assert flops(lambda: ft.linear_topk(x, w, k=2)) == product
    assert flops(lambda: ft.linear_cross_entropy(x, w, target)) == product
    assert flops(lambda: ft.linear_add_rms_norm(x, w, residual=torch.randn(4, 9))) == product
    assert flops(lambda: ft.attention(*heads)) == attention
    assert flops(lambda: ft.attention_varlen(*packed, *cu, max_seqlen_q=5, max_seqlen_k=7)
                 ) == attention  # fmt: skip
    both = flops(lambda: ft.attention(*heads), backward=True)
    packed_both = flops(lambda: ft.attention_varlen(*packed, *cu), backward=True)
    assert both == packed_both == attention // 2 * 7
    decode = flops(lambda: ft.attention_decode(new[0], cache, new_key=new[1], new_value=new[2]))
    assert decode == 2 * 3 * 2 * (4 * 4) * (8 + 8)
