"""The reference: against torch's own functions and explicit loops in float64, gradcheck, edges.

Everything else is measured by the reference, so nothing here uses another part of the package.
"""

import doctest
import importlib
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fasttransformer import reference
from fasttransformer.reference.dropout import dropout, dropout_mask, philox, random_bits

INF, NAN = math.inf, math.nan
SEED = torch.tensor([(5 << 32) + 9])
MODULES = sorted(
    path.stem
    for path in pathlib.Path(reference.__file__).parent.glob("*.py")
    if path.stem[0] != "_"
)


def rand(*shape, grad=False, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def gradients(out, *inputs):
    """Gradients of a sum that weighs every element differently."""
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), inputs)


def test_every_operation_is_exported():
    for name in reference.__all__:
        assert callable(getattr(reference, name)), name


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = importlib.import_module(f"fasttransformer.reference.{module}")
    result = doctest.testmod(found)
    assert result.attempted > 0 and result.failed == 0


# ---------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "counter, key, words",
    [  # Random123's own known-answer file, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    def tensors(text):
        return [torch.tensor(int(word, 16)) for word in text.split()]

    assert [int(w) for w in philox(tensors(counter), tensors(key))] == [
        int(w, 16) for w in words.split()
    ]


def python_philox(seed, position):
    """The same cipher in Python's unbounded integers."""
    c = [(position >> 2) & 0xFFFFFFFF, (position >> 34) & 0xFFFFFFFF, 0, 0]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[position & 3]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**63), int(SEED)])
def test_random_bits_use_all_of_seed_and_position(seed):
    positions = [0, 1, 2, 3, 4, 2**31, 2**34 - 1, 2**34, 2**34 + 5, 2**62 + 7]
    bits = random_bits(torch.tensor([seed]), torch.tensor(positions))
    assert bits.tolist() == [python_philox(seed, p) for p in positions]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5,), (2, 3, 7)])
def test_dropout_mask_counts_positions_in_order(shape):
    mask = dropout_mask(SEED, shape, 0.3)
    assert mask.shape == shape
    flat = [python_philox(int(SEED), p) >= int(0.3 * 2**32) for p in range(mask.numel())]
    assert mask.flatten().tolist() == flat


def test_dropout_keeps_the_mean():
    x = torch.ones(100_000, dtype=torch.float64)
    out = dropout(x, 0.2, SEED)
    close(out.max(), torch.tensor(1.25, dtype=torch.float64))
    assert abs(out.mean() - 1) < 0.01
    assert not torch.equal(dropout(x, 0.2), dropout(x, 0.2))  # no seed: torch's generator


# ---------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("scale", [None, 0.7, 0.0, -2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_equals_torch(log, dim, scale, masked):
    ours = reference.log_softmax if log else reference.softmax
    torchs = torch.log_softmax if log else torch.softmax
    x = rand(2, 5, 4, grad=True)
    mask = torch.rand(2, 1, 4) > 0.3 if masked else None
    if masked:
        mask[:, :, 0] = True
        mask[0] = True
    want = x * (1.0 if scale is None else scale)
    if masked:
        want = want.masked_fill(~mask, -INF)
    want = torchs(want, dim)
    got = ours(x, dim, scale=scale, mask=mask)
    close(got, torch.where(want.isnan(), -INF if log else 0.0, want))
    assert gradcheck(
        lambda x: torch.where(
            (y := ours(x, dim, scale=scale, mask=mask)).isinf(), 0.0, y
        ), x, fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
def test_softmax_masked_row_and_masked_nan(log):
    ours = reference.log_softmax if log else reference.softmax
    nothing = -INF if log else 0.0
    x = torch.tensor([[NAN, 1.0, 2.0], [NAN, INF, 3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, False, False]])
    with torch.autograd.detect_anomaly(check_nan=True):
        out = ours(x, mask=mask)
        (grad,) = torch.autograd.grad((torch.where(out.isinf(), 0.0, out) ** 2).sum(), x)
    assert (out[~mask] == nothing).all()
    close(out[0, 1:], (torch.log_softmax if log else torch.softmax)(x[0, 1:], -1))
    assert not grad[~mask].any() and grad[0, 1:].all()
    (grad,) = torch.autograd.grad(ours(x, mask=mask)[1].sum(), x)  # upstream gradient at -inf
    assert not grad.any()


def test_softmax_causal_is_the_mask_tril():
    x = rand(2, 3, 5)
    for dim in (-1, -2):
        got = reference.softmax(x, dim, is_causal=True)
        close(got, reference.softmax(x, dim, mask=torch.ones(3, 5).tril().bool()))
    row = torch.rand(5) > 0.5
    both = reference.softmax(x, mask=row, is_causal=True)
    close(both, reference.softmax(x, mask=row & torch.ones(3, 5).tril().bool()))


def test_softmax_dtype_and_odd_shapes():
    x = rand(3, 4).bfloat16()
    assert reference.softmax(x).dtype == torch.bfloat16
    close(
        reference.softmax(x, dtype=torch.float32), torch.softmax(x, -1, dtype=torch.float32), 1e-6
    )
    close(reference.softmax(x, dtype=torch.float64), torch.softmax(x, -1, dtype=torch.float64))
    assert reference.softmax(rand(3, 0)).shape == (3, 0)
    assert reference.softmax(rand(0, 3), mask=torch.ones(3).bool()).shape == (0, 3)
    assert reference.softmax(rand()) == 1
    assert reference.softmax(torch.tensor([-INF, -INF])).isnan().all()  # torch's rule: no mask
    rows = reference.softmax(torch.tensor([[NAN, 1.0], [1.0, 1.0]]))
    assert rows[0].isnan().all() and (rows[1] == 0.5).all()


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("shape, normalized", [
    ((2, 3, 8), (8,)), ((2, 3, 4, 8), (4, 8)), ((8,), (8,)), ((0, 8), (8,)), ((3, 1), (1,)),
])  # fmt: skip
@pytest.mark.parametrize("affine", [False, True])
def test_norms_equal_torch(shape, normalized, affine):
    x = rand(*shape, grad=True)
    weight, bias = (rand(*normalized, grad=True), rand(*normalized, grad=True)) if affine else (
        None, None
    )  # fmt: skip
    inputs = [t for t in (x, weight, bias) if t is not None]
    out = reference.layer_norm(x, normalized, weight, bias, 1e-3)
    want = F.layer_norm(x, normalized, weight, bias, 1e-3)
    close(out, want)
    for got, expected in zip(gradients(out, *inputs), gradients(want, *inputs), strict=True):
        close(got, expected)
    for eps in (None, 1e-3):
        out = reference.rms_norm(x, normalized, weight, eps)
        want = F.rms_norm(x, normalized, weight, eps)
        close(out, want)
        inputs = [t for t in (x, weight) if t is not None]
        for got, expected in zip(gradients(out, *inputs), gradients(want, *inputs), strict=True):
            close(got, expected, 1e-10)
    if x.numel():
        assert gradcheck(
            lambda *a: reference.layer_norm(a[0], normalized, *a[1:], eps=0.1),
            tuple(t for t in (x, weight, bias) if t is not None), fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_in_narrow_dtypes_equal_torch(dtype, eps):
    x, weight = (rand(4, 32) * 1e-3).to(dtype), rand(32).to(dtype)
    step = 2 * torch.finfo(dtype).eps
    close(reference.rms_norm(x, (32,), weight, eps), F.rms_norm(x, (32,), weight, eps), step)
    close(reference.layer_norm(x, (32,), weight), F.layer_norm(x, (32,), weight), 2 * step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layer_norm_of_one_feature_is_the_bias(dtype):
    """pytorch/pytorch#188372."""
    x = torch.tensor([[6e4], [-1e-3], [0.1]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([2.0], dtype=dtype, requires_grad=True)
    bias = torch.tensor([3.0], dtype=dtype, requires_grad=True)
    out = reference.layer_norm(x, (1,), weight, bias)
    assert (out == 3).all()
    d_x, d_weight, d_bias = gradients(out, x, weight, bias)
    assert not d_x.any() and not d_weight.any() and d_bias == 3


@pytest.mark.parametrize("x_dtype, weight_dtype", [
    (torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64),
])  # fmt: skip
def test_norms_give_the_inputs_dtype(x_dtype, weight_dtype):
    """intel/intel-extension-for-pytorch#731."""
    x, weight = rand(2, 8).to(x_dtype), rand(8).to(weight_dtype).requires_grad_()
    outs = [
        reference.layer_norm(x, (8,), weight, weight),
        reference.rms_norm(x, (8,), weight),
        *reference.add_layer_norm(x, x.float(), (8,), weight, weight),
        *reference.add_rms_norm(x, x.float(), (8,), weight),
    ]
    assert all(out.dtype == x_dtype for out in outs)
    (grad,) = torch.autograd.grad(outs[0].sum(), weight)
    assert grad.dtype == weight_dtype


def test_norms_refuse_a_shape_that_is_not_the_inputs_end():
    for norm in (reference.layer_norm, reference.rms_norm):
        for shape in ((4, 8), (3,), (), (1, 2, 3, 8)):
            with pytest.raises(ValueError, match="normalized_shape"):
                norm(rand(2, 3, 8), shape)


def test_layer_norm_of_a_large_mean():
    x = 1e8 + rand(3, 64)
    close(reference.layer_norm(x, (64,)), F.layer_norm(x - 1e8, (64,)), 1e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_add_norms(dropout_p):
    x, residual, weight, bias = (
        rand(3, 8, grad=True), rand(3, 8, grad=True), rand(8, grad=True), rand(8, grad=True)
    )  # fmt: skip
    keep = dropout_mask(SEED, (3, 8), dropout_p)
    summed = residual + x * keep / (1 - dropout_p)
    how = {"dropout_p": dropout_p, "seed": SEED if dropout_p else None}
    normed, got = reference.add_layer_norm(x, residual, (8,), weight, bias, 1e-3, **how)
    close(got, summed)
    close(normed, F.layer_norm(summed, (8,), weight, bias, 1e-3))
    normed, got = reference.add_rms_norm(x, residual, (8,), weight, 1e-3, **how)
    close(got, summed)
    close(normed, F.rms_norm(summed, (8,), weight, 1e-3))
    assert gradcheck(
        lambda x, r, w, b: reference.add_layer_norm(x, r, (8,), w, b, **how),
        (x, residual, weight, bias), fast_mode=True,
    )  # fmt: skip
    assert gradcheck(
        lambda x, r, w: reference.add_rms_norm(x, r, (8,), w, **how),
        (x, residual, weight), fast_mode=True,
    )  # fmt: skip


def test_add_norms_take_statistics_of_the_rounded_sum():
    x, residual = rand(4, 16).bfloat16(), 100 * rand(4, 16).bfloat16()
    normed, summed = reference.add_layer_norm(x, residual, (16,))
    assert torch.equal(summed, (x.float() + residual.float()).bfloat16())
    assert torch.equal(normed, reference.layer_norm(summed, (16,)))


# ----------------------------------------------------------------------------------- linear forms

ACTS = {
    None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 2, 3)])
def test_linear_add_equals_torch(activation, leading):
    x, weight, bias = rand(*leading, 6, grad=True), rand(5, 6, grad=True), rand(5, grad=True)
    residual = rand(*leading, 5, grad=True)
    out = reference.linear_add(x, weight, bias, residual, activation=activation)
    close(out, ACTS[activation](F.linear(x, weight, bias)) + residual)
    close(reference.linear_add(x, weight), F.linear(x, weight))
    if x.numel():
        assert gradcheck(
            lambda *a: reference.linear_add(*a, activation=activation),
            (x, weight, bias, residual), fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize("heads", [1, 3])
def test_linear_add_reads_attentions_output(heads):
    attended, weight = rand(2, heads, 4, 5), rand(7, heads * 5)
    joined = attended.transpose(1, 2).reshape(2, 4, heads * 5)
    residual = rand(2, 4, 7)
    close(
        reference.linear_add(attended, weight, None, residual), F.linear(joined, weight) + residual
    )
    if heads > 1:
        close(reference.linear_add(attended, weight), F.linear(joined, weight))
    normed, summed = reference.linear_add_layer_norm(attended, weight, None, residual, None, None)
    close(summed, F.linear(joined, weight) + residual)
    close(normed, F.layer_norm(summed, (7,)))


def test_linear_add_norms():
    x, weight, bias = rand(3, 6, grad=True), rand(5, 6, grad=True), rand(5, grad=True)
    residual, scale, shift = rand(3, 5, grad=True), rand(5, grad=True), rand(5, grad=True)
    summed = F.linear(x, weight, bias) + residual
    inputs = (x, weight, bias, residual, scale)
    outs = reference.linear_add_layer_norm(*inputs, shift, 1e-3)
    close(outs[0], F.layer_norm(summed, (5,), scale, shift, 1e-3))
    close(outs[1], summed)
    outs = reference.linear_add_rms_norm(*inputs, 1e-3)
    close(outs[0], F.rms_norm(summed, (5,), scale, 1e-3))
    close(outs[1], summed)
    close(
        reference.linear_add_rms_norm(x, weight, None, None, None)[0],
        F.rms_norm(F.linear(x, weight), (5,)),
    )
    assert gradcheck(reference.linear_add_layer_norm, (*inputs, shift), fast_mode=True)
    assert gradcheck(reference.linear_add_rms_norm, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_forms_round_once(dtype):
    x, weight, bias = rand(4, 64).to(dtype), rand(32, 64).to(dtype), rand(32).to(dtype)
    wide = [t.double() for t in (x, weight, bias)]
    for op in (reference.linear_add, reference.linear_softmax):
        got, want = op(x, weight, bias), op(*wide)
        assert got.dtype == dtype
        close(got.double(), want, torch.finfo(dtype).eps)
    out = reference.feed_forward(x, weight, bias, weight.T, None)
    want = reference.feed_forward(wide[0], wide[1], wide[2], wide[1].T, None)
    close(out.double(), want, torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
def test_feed_forward(activation):
    gated = activation in ("swiglu", "geglu")
    x, weight_in = rand(3, 4, grad=True), rand(12 if gated else 6, 4, grad=True)
    bias_in, weight_out = rand(len(weight_in), grad=True), rand(5, 6, grad=True)
    bias_out = rand(5, grad=True)
    hidden = F.linear(x, weight_in, bias_in)
    if gated:
        act = F.silu if activation == "swiglu" else F.gelu
        hidden = act(hidden[:, :6]) * hidden[:, 6:]
    else:
        hidden = ACTS[activation](hidden)
    inputs = (x, weight_in, bias_in, weight_out, bias_out)
    close(
        reference.feed_forward(*inputs, activation=activation),
        F.linear(hidden, weight_out, bias_out),
    )
    assert gradcheck(
        lambda *a: reference.feed_forward(*a, activation=activation), inputs, fast_mode=True
    )


# ------------------------------------------------------------------------- compile, vmap, 16 bits


def compiled_cases():
    x, weight = rand(3, 8), rand(8, 8)
    query = rand(2, 4, 5, 8)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    yield (
        "attention",
        lambda q: reference.attention(
            q, q[:, :2], q[:, :2], mask=mask, bias=mask.double(), is_causal=True, window=(3, None),
            softcap=5.0, alibi_slopes=torch.ones(4), sinks=torch.ones(4), dropout_p=0.2, seed=SEED,
            key_lengths=torch.tensor([5, 3]),
        ),
        query,
    )  # fmt: skip
    yield "sdpa", lambda q: reference.scaled_dot_product_attention(q, q, q, is_causal=True), query
    yield "merge", lambda q: reference.merge_attention([q, q], [q[..., 0], q[..., 1]])[0], query
    table = torch.ones(5, 4)
    yield "rotary", lambda q: reference.rotary_embedding(q, q, table, table)[0], query
    yield "softmax", lambda x: reference.softmax(x, scale=-1.0, is_causal=True), x
    yield "layer_norm", lambda x: reference.layer_norm(x, (8,), x[0]), x
    yield (
        "add_rms_norm",
        lambda x: reference.add_rms_norm(x, x, (8,), dropout_p=0.1, seed=SEED)[0],
        x,
    )
    yield "linear_add", lambda x: reference.linear_add(x, weight, x[0], x, activation="gelu"), x
    yield (
        "linear_cross_entropy",
        lambda x: reference.linear_cross_entropy(x, weight, torch.tensor([1, -100, 3])),
        x,
    )
    yield "linear_topk", lambda x: reference.linear_topk(x, weight, k=2)[0], x


torch.manual_seed(2)
COMPILED = {name: (function, x) for name, function, x in compiled_cases()}


@pytest.mark.parametrize("case", COMPILED)
def test_traces_without_graph_breaks(case):
    function, x = COMPILED[case]
    torch._dynamo.reset()
    x = x.clone().requires_grad_()
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    close(got, want)
    close(gradients(got, x)[0], gradients(want, x)[0])


def test_attention_under_vmap():
    """pytorch/pytorch#151558."""
    query, key, value = (rand(4, 2, 2, 5, 8) for _ in range(3))
    mask = torch.rand(4, 2, 1, 5, 5) > 0.3

    def one(q, k, v, m):
        return reference.attention(q, k, v, mask=m, is_causal=True)

    got = torch.vmap(one)(query, key, value, mask)
    close(got, torch.stack([one(*args) for args in zip(query, key, value, mask, strict=True)]))
    shared = torch.vmap(one, in_dims=(0, 0, 0, None))(query, key, value, mask[0])
    close(shared, torch.stack([one(*a, mask[0]) for a in zip(query, key, value, strict=True)]))


def test_sixteen_bits_never_meet_a_sixteen_bit_matmul():
    """torch's bf16 matmul has no fast path on CPUs without bf16 instructions."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ("mm", "matmul", "linear")):
                seen.extend(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    x, weight = rand(2, 8).bfloat16().requires_grad_(), rand(8, 8).bfloat16().requires_grad_()
    heads = x.view(1, 1, 2, 8)
    with Watch():
        loss = reference.attention(heads, heads, heads).sum()
        loss = loss + reference.linear_add(x, weight).sum()
        loss = loss + reference.feed_forward(x, weight, None, weight, None).sum()
        loss = loss + reference.linear_cross_entropy(x, weight, torch.tensor([1, 2]))
        loss.backward()
    assert seen and set(seen) == {torch.float32}


def test_autocast_does_not_reach_inside():
    x, weight = rand(4, 64, dtype=torch.float32), rand(8, 64, dtype=torch.float32)
    heads = x.view(1, 2, 2, 64)

    def run():
        return (
            reference.attention(heads, heads, heads),
            reference.linear_add(x, weight),
            reference.feed_forward(x, weight, None, weight.T, None),
            reference.linear_cross_entropy(x, weight, torch.arange(4)),
            reference.linear_softmax(x, weight),
        )

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_meta_tensors():
    x = torch.empty(2, 4, 3, 8, device="meta")
    out, lse = reference.attention(
        x, x[:, :2], x[:, :2], is_causal=True, dropout_p=0.1, return_lse=True
    )
    assert out.shape == x.shape and lse.shape == x.shape[:3] and out.device.type == "meta"
    assert reference.linear_add(x, torch.empty(5, 8, device="meta")).shape == (2, 4, 3, 5)
