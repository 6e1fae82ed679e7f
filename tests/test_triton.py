"""The Triton kernels, called as operators: their numbers in Triton's interpreter, on small cases,
and their code, compiled for GPUs that need not be here (triton_offline.py)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import other_signs
from torch import Tensor

from contract import assert_close, assert_fair
from fasttransformer import reference
from fasttransformer._contract import compare_runs
from fasttransformer.backends import backends

if backends()["triton"] is not None:
    pytest.skip(f"Triton: {backends()['triton']}", allow_module_level=True)

from fasttransformer.kernels import _norm, attention
from fasttransformer.kernels import softmax as softmax_kernels
from fasttransformer.kernels._device import threshold_of

T = torch.ops.fasttransformer_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOTH_WAYS = (
    "softmax", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "linear_add",
    "linear_cross_entropy", "attention", "attention_varlen", "cross_entropy", "embedding",
    "rotary_embedding", "activation",
)  # fmt: skip
OPERATORS = [*BOTH_WAYS, *(f"{op}_backward" for op in BOTH_WAYS), "attention_decode",
             "linear_add_layer_norm", "linear_add_rms_norm", "linear_softmax",
             "linear_topk"]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on inf − inf


def rand(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def compared(outs, grads, function, inputs, cotangents):
    """Outputs and gradients against `function`, the reference, in float64 and the inputs' dtype."""

    def run(dtype):
        args = [
            x if x is None else x.detach().cpu().to(dtype or x.dtype).requires_grad_()
            for x in inputs
        ]
        results = function(*args)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [x for x, g in zip(args, grads) if g is not None]
        if not wanted:
            return results, ()
        loss = sum((r * c.cpu().to(r.dtype)).sum() for r, c in zip(results, cotangents))
        return results, torch.autograd.grad(loss, wanted)

    given = [g for g in grads if g is not None]
    return compare_runs((outs, given), run(torch.float64), run(None))


def hold(*arguments):
    for name, found in compared(*arguments).items():
        assert found.problem is None, f"{name}: {found.problem}"


# ---- operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_schema_equals_that_of_cpp(op):
    ours = getattr(T, op).default._schema
    name, _, rest = str(ours).partition("(")
    assert name == f"fasttransformer_triton::{op}"
    packet = getattr(torch.ops.fasttransformer, op, None)
    if packet is None:
        pytest.skip("the C++ library is not built")
    assert rest == str(packet.default._schema).partition("(")[2]


def test_every_cpp_operator_with_kernels_is_listed():
    path = Path(__file__).parents[1] / "csrc" / "registration.cpp"
    text = path.read_text()
    assert all(f"{op}(" in text for op in OPERATORS)


def test_compile_keeps_the_operator_whole():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = rand(3, 5)
    call = torch.compile(
        lambda x: T.softmax(x, 1.0, None, False, False) * 2, backend=backend, fullgraph=True
    )
    torch.testing.assert_close(call(x), torch.softmax(x, -1) * 2)
    assert "fasttransformer_triton.softmax" in graphs[0].code


# ---- softmax ------------------------------------------------------------------------------------


def compared_softmax(x, scale=1.0, mask=None, is_causal=False):
    """softmax and log_softmax, forward and backward: name → comparison."""
    mask = None if mask is None else mask.to(DEVICE).expand(x.shape)
    found = {}
    for log in (False, True):
        out = T.softmax(x, scale, mask, is_causal, log)
        assert out.is_contiguous()
        cotangent = rand(*x.shape, dtype=x.dtype)
        # Entries that are −inf by definition carry no gradient; NaN there must not be felt.
        cotangent = torch.where(out.isfinite(), cotangent, 0)
        grad = T.softmax_backward(cotangent, out, scale, log)
        function = reference.log_softmax if log else reference.softmax
        cpu_mask = None if mask is None else mask.cpu()

        def finite(y):
            r = function(y, scale=scale, mask=cpu_mask, is_causal=is_causal)  # noqa: B023
            return torch.where(r == -math.inf, 0, r)

        outs = [torch.where(out == -math.inf, 0, out)]
        each = compared(outs, [grad], finite, [x], [cotangent])
        found |= {f"{name}, log {log}": value for name, value in each.items()}
    return found


def run_softmax(x, scale=1.0, mask=None, is_causal=False):
    for name, found in compared_softmax(x, scale, mask, is_causal).items():
        assert found.problem is None, f"{name}: {found.problem}"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(3, 1), (70, 33), (2, 3, 5, 17), (1, 5000)])
def test_softmax(shape, dtype):
    run_softmax(rand(*shape, dtype=dtype))


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.0, -2.0])  # b26: masking comes after scaling
def test_softmax_mask_and_causal(scale, looped, monkeypatch):
    if looped:  # the kernel for rows that registers do not hold, on short rows
        monkeypatch.setattr(softmax_kernels, "MAX_BLOCK", 16)
        monkeypatch.setattr(softmax_kernels, "LOOP_BLOCK", 32)

    batch = 1 if looped else 2  # a program per row takes the interpreter long

    def masked():
        x, mask = rand(batch, 1, 9, 75), torch.rand(batch, 1, 9, 75) > 0.5
        mask[0, 0, 3] = False  # b01: a row without entries gives 0, log −inf, gradient 0
        x[..., 70] = math.nan
        mask[..., 70] = False  # b04: what a masked entry holds is not felt
        return compared_softmax(x, scale, mask)

    # A gradient's largest error is that of one row whose softmax is nearly one-hot: over 40 seeds
    # the ratio to torch's is 0.2 to 5.6, its mean 1.0 (scale −2), so one draw proves nothing.
    assert_fair(masked)
    assert_fair(lambda: compared_softmax(rand(9, 40), scale, is_causal=True))
    mask = torch.rand(20, 1) > 0.3
    assert_fair(lambda: compared_softmax(rand(batch, 20, 9), scale, mask, is_causal=True))


def test_softmax_strides_b49():
    x = rand(4, 8, 16, 16).transpose(1, 2)
    run_softmax(x, mask=torch.rand(4, 1, 1, 16) > 0.3)
    run_softmax(rand(5, 1, 7).expand(5, 6, 7), mask=torch.rand(7) > 0.3)
    run_softmax(rand(7, 20)[::2, 3:17])
    assert T.softmax(rand(0, 4), 1.0, None, False, False).shape == (0, 4)
    assert T.softmax(rand(4, 0), 1.0, None, False, False).shape == (4, 0)


@pytest.mark.parametrize("looped", [False, True])
def test_softmax_nan_stays_in_its_row(looped, monkeypatch):
    if looped:
        monkeypatch.setattr(softmax_kernels, "MAX_BLOCK", 16)
        monkeypatch.setattr(softmax_kernels, "LOOP_BLOCK", 32)
    x = rand(5, 40)
    x[1, 3], x[2], x[3, 0] = math.nan, -math.inf, math.inf
    for log in (False, True):
        out = T.softmax(x, 1.0, None, False, log)
        want = (torch.log_softmax if log else torch.softmax)(x.cpu(), -1)
        torch.testing.assert_close(out.cpu(), want, equal_nan=True)
        assert out[1:4].isnan().all()


def test_dropout_mask_is_the_references():
    seed = torch.tensor([-(2**62) + 12345], device=DEVICE)
    x = torch.ones(3, 37, device=DEVICE)
    _, summed, _ = T.add_rms_norm(x, torch.zeros_like(x), None, 1e-5, 0.4, seed)
    assert torch.equal(summed.cpu() > 0, reference.dropout.dropout_mask(seed.cpu(), (3, 37), 0.4))
    assert threshold_of(0.4) == int(0.4 * 2**32)


# ---- norms --------------------------------------------------------------------------------------

NORM_CASES = [  # rows, features, dtype, weight's dtype, dropout, looped
    (70, 33, F32, F32, 0.0, False),
    (5, 1, F32, F32, 0.0, False),  # b51: one feature
    (9, 300, BF16, F32, 0.3, False),  # b44: weight of another dtype
    (3, 64, F16, None, 0.0, False),
    (18, 200, F32, F32, 0.25, True),
    (3, 200, BF16, BF16, 0.0, True),
]


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_norms(op, case, monkeypatch):
    rows, features, dtype, weight_dtype, dropout_p, looped = case
    if looped:  # the kernels for rows that registers do not hold
        for name, value in (("MAX_FORWARD", 16), ("MAX_BACKWARD", 16), ("LOOP_BLOCK", 128)):
            monkeypatch.setattr(_norm, name, value)
    add, rms, eps = op.startswith("add"), op.endswith("rms_norm"), 1e-5
    if not add:
        dropout_p = 0.0
    seed = torch.tensor([99], device=DEVICE) if dropout_p else None
    wide = rand(rows, features + 3, dtype=dtype) * 2 + 5
    x, residual = wide[:, :features], rand(rows, features, dtype=dtype)
    weight = None if weight_dtype is None else rand(features, dtype=weight_dtype)
    bias = None if weight is None or rms else rand(features, dtype=weight_dtype)
    vectors = [weight] if rms else [weight, bias]
    out = getattr(T, op)(
        *([x, residual] if add else [x]), *vectors, eps, *([dropout_p, seed] if add else [])
    )
    outs, statistics = out[: 1 + add], out[1 + add :]
    assert all(s.dtype == F32 and s.shape == (rows,) for s in statistics)
    cotangents = [rand(rows, features, dtype=dtype) for _ in outs]
    wanted = [v is not None for v in vectors]
    grads = getattr(T, f"{op}_backward")(
        *cotangents, out[1] if add else x, weight, *statistics,
        *([dropout_p, seed] if add else []), *wanted,
    )  # fmt: skip
    vector_grads = list(grads[2 if add else 1 :])
    for vector, grad in zip(vectors, vector_grads):
        assert grad.shape == ((0,) if vector is None else vector.shape)
        assert vector is None or grad.dtype == vector.dtype
    vector_grads = [None if v is None else g for v, g in zip(vectors, vector_grads)]
    options = {"dropout_p": dropout_p, "seed": None if seed is None else seed.cpu()} if add else {}
    function = getattr(reference, op)
    if add:
        d_input = grads[1] if dropout_p else grads[0]
        assert dropout_p or grads[1].shape == (0,)
        hold(
            outs, [d_input, grads[0], *vector_grads],
            lambda x, r, *v: function(x, r, (features,), *v, eps, **options),
            [x, residual, *vectors], cotangents,
        )  # fmt: skip
    else:
        hold(
            outs, [grads[0], *vector_grads], lambda x, *v: function(x, (features,), *v, eps),
            [x, *vectors], cotangents,
        )  # fmt: skip


def test_norms_empty_and_frozen_b52():
    x, row = rand(0, 8), torch.empty(0, device=DEVICE)
    weight = rand(8)
    assert T.layer_norm(x, weight, weight, 1e-5)[0].shape == (0, 8)
    d_x, d_weight, d_bias = T.layer_norm_backward(x, x, weight, row, row, True, True)
    assert d_x.shape == (0, 8) and not d_weight.any() and not d_bias.any()
    x = rand(3, 8)
    _, mean, rstd = T.layer_norm(x, weight, weight, 1e-5)
    _, d_weight, d_bias = T.layer_norm_backward(x, x, weight, mean, rstd, False, True)
    assert d_weight.shape == (0,) and d_bias.shape == (8,)


# ---- attention ----------------------------------------------------------------------------------


def run_attention(q, k, v, *others, **options):
    """Forward and every gradient against the reference; `options` are the reference's own."""
    results = []

    def draw():
        signs = other_signs([q, k, v]) if results else [q, k, v]
        *result, found = compared_attention(*signs, *others, **options)
        results.append(result)
        return found

    assert_fair(draw)
    return results[0]


def compared_attention(q, k, v, mask=None, bias=None, sinks=None, **options):
    B, H, S, D = q.shape
    shape = (B, H, S, k.shape[2])
    left, right = options.get("window") or (None, None)
    slopes, lengths, seed = (options.get(n) for n in ("alibi_slopes", "key_lengths", "seed"))
    arguments = (
        None if mask is None else mask.to(DEVICE).expand(shape),
        None if bias is None else bias.expand(shape),
        options.get("is_causal", False),
        options.get("causal_alignment") == "bottom_right",
        -1 if left is None else left,
        -1 if right is None else right,
        options.get("softcap") or 0.0,
        None if slopes is None else slopes.to(DEVICE).expand(B, H),
        None if sinks is None else sinks,
        None if lengths is None else lengths.to(DEVICE),
        D**-0.5 if options.get("scale") is None else options["scale"],
        options.get("dropout_p", 0.0),
        None if seed is None else seed.to(DEVICE),
    )
    out, lse = T.attention(q, k, v, *arguments)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == F32
    dead = lse == -math.inf
    grad_out = rand(*out.shape, dtype=q.dtype)
    grad_lse = torch.where(dead, 0, rand(*lse.shape))
    grads = list(
        T.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *arguments, bias is not None, sinks is not None
        )
    )
    if bias is None:
        assert grads[3].shape == (0,)
        grads[3] = None
    else:
        assert grads[3].dtype == F32
        own = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        grads[3] = grads[3].sum_to_size(own).view(bias.shape).to(bias.dtype)
    if sinks is None:
        grads[4] = None

    def function(q, k, v, bias, sinks):
        out, lse = reference.attention(
            q, k, v, mask=mask, bias=bias, sinks=sinks, return_lse=True, **options
        )
        return out, torch.where(lse == -math.inf, 0, lse)

    found = compared(
        [out, torch.where(dead, 0, lse)], grads, function, [q, k, v, bias, sinks],
        [grad_out, grad_lse],
    )  # fmt: skip
    return out, lse, grads, found


#: The operator's arguments after the value, for no option and a head size of 16.
PLAIN = (None, None, False, False, -1, -1, 0.0, None, None, None, 0.25, 0.0, None)


def heads(B, H, S, D, dtype=F32):
    """(B, H, S, D) as a projection leaves it: heads last in memory."""
    return rand(B, S, H, D, dtype=dtype).transpose(1, 2)


ATTENTION_CASES = {
    # (heads, key heads, queries, keys, D, E, dtype), options
    "plain": ((2, 2, 64, 96, 32, 32, F32), {}),
    "one query": ((2, 1, 1, 20, 16, 16, F32), {}),  # b19
    "bf16 grouped causal": ((4, 2, 70, 70, 40, 24, BF16), {"is_causal": True}),  # b22
    "f16 bottom right": (
        (2, 1, 40, 75, 16, 20, F16),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "more queries than keys, bottom right": (
        (1, 1, 70, 40, 16, 16, F32),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "negative scale": ((1, 1, 40, 40, 16, 16, F32), {"is_causal": True, "scale": -0.5}),  # b26
    "zero scale": ((1, 1, 33, 33, 16, 16, F32), {"is_causal": True, "scale": 0.0}),
    "window": ((1, 1, 70, 130, 16, 16, F32), {"window": (40, 5)}),
    "causal window": (
        (1, 1, 70, 130, 16, 16, BF16),
        {"window": (35, None), "is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "softcap": ((1, 1, 40, 70, 16, 16, F32), {"softcap": 1.5}),
    "alibi": (
        (2, 2, 40, 70, 16, 16, F32),
        {"alibi_slopes": torch.tensor([0.5, 0.06]), "is_causal": True},
    ),
    "key lengths": (
        (1, 1, 33, 70, 16, 16, F32),
        {"key_lengths": torch.tensor([35, 0], dtype=torch.int32)},
    ),
    "dropout": ((2, 1, 40, 37, 16, 16, F32), {"dropout_p": 0.3, "seed": torch.tensor([-5])}),
}


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_attention(name):
    (H, G, S, K, D, E, dtype), options = ATTENTION_CASES[name]
    q, k, v = heads(2, H, S, D, dtype), heads(2, G, K, D, dtype), heads(2, G, K, E, dtype)
    run_attention(q, k, v, **options)


def test_attention_sinks_with_dead_rows():
    q, k, v = heads(2, 2, 33, 16), heads(2, 2, 40, 16), heads(2, 2, 40, 16)
    lengths = torch.tensor([40, 0], dtype=torch.int32)
    out, lse, _ = run_attention(q, k, v, sinks=rand(2), key_lengths=lengths)
    assert not out[1].any() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("shape", [(2, 2, 33, 65), (1, 2, 33, 65), (2, 1, 1, 65), (33, 1), (1,)])
def test_attention_bias_gradient_b16(shape):
    q, k, v = heads(2, 2, 33, 16, BF16), heads(2, 2, 65, 16, BF16), heads(2, 2, 65, 16, BF16)
    # A float32 bias of 16-bit inputs gets a gradient of 16-bit quality: it goes through the
    # rounded out (delta).
    run_attention(q, k, v, bias=rand(*shape, dtype=BF16))


def test_attention_bias_split_and_float32(monkeypatch):
    monkeypatch.setattr(attention, "BIAS_PROGRAMS", 5)
    q, k, v = heads(3, 2, 33, 16), heads(3, 2, 40, 16), heads(3, 2, 40, 16)
    wide = rand(2, 33, 48)
    wide[..., 40:] = math.nan  # b17: the cut-off columns are never read
    run_attention(q, k, v, bias=wide[..., :40])


def test_attention_masks_b01_b04():
    q, k, v = heads(1, 2, 40, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16)
    mask = torch.rand(1, 2, 40, 70) > 0.5
    mask[:, :, 5] = False
    mask[:, 1, 33:] = False
    out, lse, grads = run_attention(q, k, v, mask=mask)
    assert not out[:, :, 5].any() and (lse[:, :, 5] == -math.inf).all()
    assert not grads[0][:, :, 5].any()
    hidden = k.clone()
    hidden[:, :, 7] = math.nan
    mask[..., 7] = False
    clean, felt = (T.attention(q, keys, v, mask.to(DEVICE), *PLAIN[1:])[0] for keys in (k, hidden))
    assert torch.equal(clean, felt)
    run_attention(q, k, v, mask=torch.rand(40, 1) > 0.5)
    run_attention(q, k, v, bias=torch.where(mask, 0.0, -math.inf).to(DEVICE))


def test_attention_keys_behind_lengths_are_never_read():
    q, k, v = heads(1, 1, 20, 16), heads(1, 1, 70, 16), heads(1, 1, 70, 16)
    k[:, :, 40:], v[:, :, 40:] = math.nan, math.inf
    lengths = torch.tensor([40], dtype=torch.int32)
    _, _, grads = run_attention(q, k, v, key_lengths=lengths)
    assert not grads[1][:, :, 40:].any() and not grads[2][:, :, 40:].any()


def test_attention_nan_query_stays_in_its_row():
    q, k, v = heads(1, 1, 40, 16), heads(1, 1, 40, 16), heads(1, 1, 40, 16)
    clean, _ = T.attention(q, k, v, *PLAIN)
    q = q.clone()
    q[:, :, 3] = math.nan
    out, lse = T.attention(q, k, v, *PLAIN)
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    assert torch.equal(out[:, :, 4:], clean[:, :, 4:])


@pytest.mark.parametrize("length", [65, 97])
def test_attention_tail_lanes_b09(length):
    q, k, v = (rand(1, 1, length, 16) * 0.1 for _ in range(3))
    bias = torch.full((1,), -120.0, device=DEVICE)
    _, lse, grads = run_attention(q, k, v, bias=bias)
    assert lse.max() < -88.7 and all(g.isfinite().all() for g in grads[:3])


def test_attention_strides_b12_b14():
    k = rand(1, 1, 33, 24).expand(1, 4, 33, 24)
    run_attention(rand(1, 4, 5, 24), k, k, mask=torch.rand(1, 1, 5, 33) > 0.3)
    fused = rand(2, 40, 3, 2, 16)
    run_attention(*(fused[:, :, i].transpose(1, 2) for i in range(3)), is_causal=True)


def test_attention_beyond_16_bits_b24(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRETED", attention.Tile(16, 8192, 4, 1))
    q, k, v = rand(1, 1, 4, 16), rand(1, 1, 65537, 16), rand(1, 1, 65537, 16)
    mask = torch.arange(65537, device=DEVICE) >= 65530
    out, _ = T.attention(q, k, v, mask.expand(1, 1, 4, 65537), *PLAIN[1:])
    want = reference.attention(q.cpu(), k[:, :, 65530:].cpu(), v[:, :, 65530:].cpu())
    torch.testing.assert_close(out.cpu(), want)


def test_attention_empty():
    out, lse = T.attention(heads(2, 2, 3, 16), heads(2, 2, 0, 16), heads(2, 2, 0, 8), *PLAIN)
    assert out.shape == (2, 2, 3, 8) and not out.any() and (lse == -math.inf).all()
    q, k = heads(2, 2, 0, 16), heads(2, 2, 5, 16)
    out, lse = T.attention(q, k, k, *PLAIN)
    grads = T.attention_backward(out, None, q, k, k, out, lse, *PLAIN, False, False)
    assert out.shape == (2, 2, 0, 16) and not grads[1].any() and not grads[2].any()


# ---- linear -------------------------------------------------------------------------------------

LINEAR_CASES = [(33, 40, 70, F32), (5, 17, 33, BF16), (70, 64, 32, F16), (1, 1, 1, F32)]


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_add(case):
    M, N, K, dtype = case
    x, weight = rand(M, K + 2, dtype=dtype)[:, :K], rand(N, K, dtype=dtype) * K**-0.5
    bias, residual, grad = rand(N, dtype=dtype), rand(M, N, dtype=dtype), rand(M, N, dtype=dtype)
    out = T.linear_add(x, weight, bias, residual, "")
    grads = T.linear_add_backward(grad, x, weight, True, True, True)
    hold(
        [out], [*grads, None], lambda x, w, b, r: reference.linear_add(x, w, b, r),
        [x, weight, bias, residual], [grad],
    )  # fmt: skip
    nothing = T.linear_add_backward(grad, x, weight, False, False, False)
    assert all(g.shape == (0,) for g in nothing)


@pytest.mark.parametrize("size", [32, 12])
def test_linear_add_reads_heads_in_place(size):
    x, weight, residual = rand(2, 3, 9, size), rand(40, 3 * size), rand(2, 9, 40)
    out = T.linear_add(x, weight, None, residual, "")
    d_x, d_weight, _ = T.linear_add_backward(residual, x, weight, True, True, False)
    assert d_x.shape == x.shape and d_x.is_contiguous()
    hold(
        [out], [d_x, d_weight],
        lambda x, w: reference.linear_add(x, w) + residual.cpu().to(w.dtype),
        [x, weight], [residual],
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_linear_add_activation(activation):
    x, weight = rand(40, 33), rand(20, 33)
    out = T.linear_add(x, weight, None, None, activation)
    want, peer = (
        reference.linear_add(x.cpu().to(d), weight.cpu().to(d), activation=activation)
        for d in (torch.float64, F32)
    )
    assert_close(out, want, peer)
    with pytest.raises(ValueError, match="tanh"):
        T.linear_add(x, weight, None, None, "tanh")


def test_linear_add_backward_splits_long_sums(monkeypatch):
    from fasttransformer.kernels import _matmul

    monkeypatch.setattr(_matmul, "SPLIT_K", 32)
    x, weight, grad = rand(150, 20), rand(24, 20), rand(150, 24)
    _, d_weight, d_bias = T.linear_add_backward(grad, x, weight, False, True, True)
    torch.testing.assert_close(d_weight, grad.T @ x)
    torch.testing.assert_close(d_bias, grad.sum(0))


@pytest.mark.parametrize("N", [40, 100])  # one kernel, two kernels
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", ["linear_add_layer_norm", "linear_add_rms_norm"])
def test_linear_add_norm(op, dtype, N):
    x, weight, residual = (rand(*s, dtype=dtype) for s in ((37, 50), (N, 50), (37, N)))
    norm = [rand(N, dtype=dtype)] + ([rand(N, dtype=dtype)] if op.endswith("layer_norm") else [])
    outs = getattr(T, op)(x, weight, norm[0], residual, *norm, 1e-5, True)
    alone, nothing, *_ = getattr(T, op)(x, weight, norm[0], residual, *norm, 1e-5, False)
    assert torch.equal(alone, outs[0]) and nothing.numel() == 0
    hold(
        outs[:2], [None] * 3 + [None] * len(norm),
        lambda x, w, r, *n: getattr(reference, op)(x, w, n[0], r, *n, 1e-5),
        [x, weight, residual, *norm], [torch.zeros_like(o) for o in outs[:2]],
    )  # fmt: skip


# ---- code ---------------------------------------------------------------------------------------

#: Shared memory of a block, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@pytest.mark.parametrize("target", SHARED)
def test_compiles_offline(target):
    """Every kernel gives code for every target; norms, softmax and dropout in a product's tile
    spill nothing."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(here), "TRITON_DEFAULT_FP_FUSION": "1"}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(here / "triton_offline.py"), target, "few"],
        env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    print(f"\n{target:8} registers spilled shared warps  kernel")
    for row in rows:
        print(f"{'':8} {row['registers']:9} {row['spilled']:7} {row['shared']:6} {row['warps']:5}  "
              f"{row['kernel']}")  # fmt: skip
    assert {name.partition(" ")[0] for name in (row["kernel"] for row in rows)} == KERNELS
    mma = {"sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}.get(target, "mma.sync")
    for row in rows:
        name = row["kernel"]
        assert row["bytes"] > 0 and row["shared"] <= SHARED[target], row
        if "dropout" in name or not name.startswith(("_attention", "_matmul")):
            assert row["spilled"] == 0, row
        matmul = name.startswith(("_attention.f", "_attention_backward.d", "_matmul.m"))
        full = not FEW_ROWS.intersection(name.replace("]", " ").split())
        if matmul and full and "delta" not in name:
            assert mma in row["mma"], row
        if name.startswith("_attention.forward") and target != "gfx942":
            assert "ex2.approx" in row["mma"], row


#: Cases whose tiles have fewer rows than wgmma's 64, or float32, which runs on FMA units.
FEW_ROWS = {"decode", "4x4096x4096", "256", "f32"}
KERNELS = {
    "softmax._forward", "softmax._forward_looped", "softmax._backward", "softmax._backward_looped",
    "_norm._forward", "_norm._forward_looped", "_norm._backward", "_norm._backward_looped",
    "_norm._weight_gradients", "_reduce._sum_partials", "_attention.forward_kernel",
    "_attention_backward.delta_kernel", "_attention_backward.dkdv_kernel",
    "_attention_backward.dq_kernel", "_attention_backward.dbias_kernel", "_matmul.matmul_kernel",
    "linear_cross_entropy._rows",
    "linear_topk._largest",
    "_matmul.matmul_norm_kernel", "_matmul.column_sums_kernel", "cross_entropy._forward",
    "cross_entropy._backward", "embedding._forward", "embedding._sum_tiles",
    "embedding._join_tiles", "rotary_embedding._rotate", "activation._forward",
    "activation._backward",
}  # fmt: skip
