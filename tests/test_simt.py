"""The CUDA kernels' own source, run on the CPU by csrc/simt, against the reference in float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_IDS = ("f32", "f16", "bf16")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
# Under one chunk, at the edges of a plan's chunks and groups, odd, and past what registers hold.
COLUMNS = (1, 7, 8, 9, 64, 77, 250, 257, 1000, 2049, 8193, 16389)


def softmax_check(inputs, *, log=False, limits=None, grads=True, **options):
    name = "log_softmax" if log else "softmax"
    with simt.limits(**(limits or {})):
        contract.check(
            lambda x: getattr(ft, name)(x, **options),
            lambda x: getattr(reference, name)(x, **options),
            [inputs],
            on="simt",
            grads=grads,
        )


# ---- softmax ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
@pytest.mark.parametrize("columns", COLUMNS)
def test_softmax(columns, dtype, log):
    softmax_check((torch.randn(5, columns) * 3).to(dtype), log=log, scale=0.7)


@dtypes
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
@pytest.mark.parametrize("columns", (3, 40, 77, 600, 16389))
def test_softmax_mask_and_causal(columns, dtype, log):
    batch = 2 if columns > 1000 else 8  # enough numbers that the peer is not right by luck
    x = torch.randn(batch, 4, columns).to(dtype)
    mask = torch.rand(batch, 4, columns) < 0.5
    mask[0, 1] = False
    softmax_check(x, log=log, mask=mask, scale=-0.3)
    softmax_check(x, log=log, mask=mask, is_causal=True)
    softmax_check(x, log=log, mask=mask[:1, :1].expand(x.shape))
    softmax_check(x, log=log, mask=mask[:, :, :1].expand(x.shape))


@pytest.mark.parametrize("scale", (-0.5, -0.001, 0.0))
def test_softmax_b26_scale_of_zero_or_less(scale):
    x = torch.randn(1, 4, 4)
    softmax_check(x, scale=scale, is_causal=True)
    softmax_check(x, scale=scale, mask=torch.rand(1, 4, 4) < 0.7)


@dtypes
def test_softmax_b49_strides_and_alignment(dtype):
    softmax_check(torch.randn(4, 8, 16, 16).to(dtype).transpose(1, 2))
    softmax_check(torch.randn(3, 5, 2, 24).to(dtype)[:, ::2].transpose(0, 2), is_causal=True)
    for offset in (1, 2, 4, 5):  # rows that start at any place of a chunk, in a wider buffer
        softmax_check(torch.randn(6, 90).to(dtype)[:, offset : offset + 77])
    softmax_check(torch.randn(7).to(dtype))
    mask = torch.rand(4, 1, 1, 16) < 0.6
    softmax_check(torch.randn(4, 2, 3, 16).to(dtype), mask=mask)


@dtypes
def test_softmax_loops_over_rows_when_the_grid_is_cut_short(dtype):
    for columns in (5, 77, 700, 9000):
        softmax_check(torch.randn(37, columns).to(dtype), limits={"grid": 2})


@dtypes
@pytest.mark.parametrize("shared", (1024, 4096, 20000), ids=lambda s: f"{s}B")
def test_softmax_wide_rows_that_shared_memory_holds_in_part(dtype, shared):
    x = torch.randn(2, 17001).to(dtype)
    softmax_check(x, limits={"shared": shared}, mask=torch.rand(2, 17001) < 0.9)
    softmax_check(x, limits={"shared": shared}, log=True, is_causal=True)


@dtypes
def test_softmax_262144_columns(dtype):
    softmax_check(torch.randn(1, 262144).to(dtype))


@pytest.mark.parametrize("columns", (6, 300, 8200))
def test_softmax_nan_and_infinity_stay_in_their_row(columns):
    x = torch.randn(6, columns)
    x[1, columns // 2] = math.nan
    x[2, -1] = math.inf
    x[3] = -math.inf
    x[4, : columns - 1] = -math.inf
    x[5] = math.nan
    for log in (False, True):
        softmax_check(x, log=log, grads=False)
        mask = torch.ones(6, columns, dtype=torch.bool)
        mask[0] = False
        mask[:, 0] = False
        mask[1, columns // 2] = False  # a masked NaN is not felt
        softmax_check(x, log=log, mask=mask, grads=False)


def test_log_softmax_gradient_of_left_out_entries_is_zero():
    x = torch.randn(3, 9)
    mask = torch.rand(3, 9) < 0.5
    mask[1] = False
    operators = simt.load() and torch.ops.fasttransformer_simt
    out = operators.softmax(x, 1.0, mask, False, True)
    d_input = operators.softmax_backward(torch.ones_like(x), out, 1.0, True)
    assert not d_input[~mask].any()


# ---- add_layer_norm -----------------------------------------------------------------------------


def norm_check(shape, dtype, *, affine=True, limits=None, weight_dtype=None, widen=0):
    features = shape[-1]
    x = (torch.randn(*shape[:-1], features + widen)).to(dtype)[..., :features]
    residual = (torch.randn(*shape) + 1).to(dtype)
    weights = [torch.randn(features).to(weight_dtype or dtype) for _ in range(2)]
    inputs = [x, residual, *(weights if affine else [None, None])]
    with simt.limits(**(limits or {})):
        contract.check(
            lambda a, b, w, c: ft.add_layer_norm(a, b, (features,), w, c),
            lambda a, b, w, c: reference.add_layer_norm(a, b, (features,), w, c),
            inputs,
            on="simt",
        )


@dtypes
@pytest.mark.parametrize("features", (1, 7, 8, 33, 64, 77, 384, 1000, 2052, 4100, 8200))
def test_add_layer_norm(features, dtype):
    norm_check((5, features), dtype)


@dtypes
def test_add_layer_norm_options(dtype):
    norm_check((2, 3, 40), dtype, affine=False)
    norm_check((70, 24), dtype, limits={"grid": 2})
    norm_check((9, 40), dtype, widen=3)  # rows of a wider buffer: no two are aligned alike
    norm_check((9, 48), dtype, widen=16)
    norm_check((3, 9001), dtype, limits={"shared": 4096})
    norm_check((0, 8), dtype)


@pytest.mark.parametrize("weight", DTYPES, ids=DTYPE_IDS)
@dtypes
def test_add_layer_norm_weights_of_another_dtype(dtype, weight):
    # The reference gives gradients in float64 and the peer in the weight's dtype: compared there.
    if dtype == torch.float32 or weight == torch.float32:
        norm_check((6, 72), dtype, weight_dtype=weight)


@dtypes
@pytest.mark.parametrize("shape", ((7, 30), (5, 64), (3, 1001), (2, 9001)), ids=str)
@pytest.mark.parametrize("with_sum", (False, True), ids=("", "grad_summed"))
def test_add_layer_norm_dropout(shape, dtype, with_sum):
    simt.load()
    operators = torch.ops.fasttransformer_simt
    features, eps, p = shape[1], 1e-5, 0.3
    seed = torch.tensor([-(2**62) + 12345])
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(features).to(dtype) for _ in range(2))
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    normed, summed, mean, rstd = operators.add_layer_norm(x, residual, weight, bias, eps, p, seed)
    got = operators.add_layer_norm_backward(
        grads[0], grads[1] if with_sum else None, summed, weight, mean, rstd, p, seed, True, True
    )

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (residual, x, weight, bias)]
        out, total = reference.add_layer_norm(
            leaves[1], leaves[0], (features,), leaves[2], leaves[3], eps, dropout_p=p, seed=seed
        )
        loss = (out * grads[0].to(dtype)).sum()
        if with_sum:
            loss = loss + (total * grads[1].to(dtype)).sum()
        return (out, total), torch.autograd.grad(loss, leaves)

    (want, want_grads), (peer, peer_grads) = run(torch.float64), run(dtype)
    for a, b, c in zip((normed, summed, *got), (*want, *want_grads), (*peer, *peer_grads)):
        contract.assert_close(a, b, c)


@dtypes
@pytest.mark.parametrize("shape", ((7, 64), (2, 9001)), ids=str)
def test_add_layer_norm_unwanted_outputs_and_repeated_bits(dtype, shape):
    simt.load()
    operators = torch.ops.fasttransformer_simt
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    _, summed, mean, rstd = operators.add_layer_norm(x, residual, None, None, 1e-5, 0.0, None)

    def backward(weight_grad, bias_grad):
        return operators.add_layer_norm_backward(
            grad, None, summed, None, mean, rstd, 0.0, None, weight_grad, bias_grad
        )

    both = backward(True, True)
    assert both[1].shape == (0,)
    for a, b in zip(both, backward(True, True)):
        assert torch.equal(a, b)
    assert torch.equal(backward(False, True)[3], both[3])
    assert backward(False, True)[2].shape == (0,)
    assert torch.equal(backward(True, False)[2], both[2])
    assert [t.shape for t in backward(False, False)[1:]] == [(0,)] * 3


def test_add_layer_norm_no_rows_gives_zero_weight_gradients():
    simt.load()
    empty, none = torch.zeros(0, 8), torch.zeros(0)
    *_, d_weight, d_bias = torch.ops.fasttransformer_simt.add_layer_norm_backward(
        empty, None, empty, torch.ones(8), none, none, 0.0, None, True, True
    )
    assert torch.equal(d_weight, torch.zeros(8)) and torch.equal(d_bias, torch.zeros(8))


@pytest.mark.parametrize("features", (6, 300, 9001))
def test_add_layer_norm_nan_stays_in_its_row(features):
    x = torch.randn(4, features)
    x[1, features // 2] = math.nan
    with simt.running():
        normed, summed = ft.add_layer_norm(x, torch.zeros_like(x), (features,))
    assert normed[1].isnan().all() and summed.isnan().sum() == 1
    assert normed[[0, 2, 3]].isfinite().all()


def test_add_layer_norm_b51_one_feature():
    with simt.running():
        x = torch.tensor([[1e6]], requires_grad=True)
        weight = torch.tensor([2.0], requires_grad=True)
        zero = torch.zeros(1, 1)
        out, _ = ft.add_layer_norm(x, zero, (1,), weight, torch.tensor([3.0]))
        out.sum().backward()
    assert out.item() == 3 and weight.grad.item() == 0 and x.grad.item() == 0


# ---- simt itself --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    library = ctypes.CDLL(str(simt.build("bugs", (simt.ROOT / "tests/simt_bugs.cpp",))))

    def run(name: str) -> tuple[torch.Tensor, str]:
        memory = torch.full((64 + 64 + 64,), 7.0)  # rooms on both sides of the output
        values = torch.arange(64.0)
        message = ctypes.create_string_buffer(512)
        pointers = (ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(memory[64:].data_ptr()))
        assert library.ft_simt_bug(name.encode(), *pointers, message) == 0
        return memory[64:128], message.value.decode()

    return run


@pytest.mark.parametrize(
    ("kernel", "want"),
    (
        ("sound", torch.full((64,), 63.0 * 32)),
        ("warp_barrier_there", torch.arange(64.0).view(-1, 2).flip(1).flatten()),
        ("atomic_sum", torch.full((64,), 63.0 * 32)),
        ("named_barriers", torch.cat([torch.full((32,), 2.0), torch.full((32,), 7.0)])),
    ),
)
def test_simt_runs_a_sound_kernel(planted, kernel, want):
    out, message = planted(kernel)
    assert message == "" and torch.equal(out, want)


@pytest.mark.parametrize(
    ("bug", "reported"),
    (
        ("load_outside", "block 0, thread 63: load outside the call's tensors"),
        ("store_outside", "block 0, thread 0: store outside the call's tensors"),
        ("store_to_input", "block 0, thread 0: store to an input"),
        ("misaligned", "block 0, thread 0: misaligned store of 16 bytes"),
        ("barrier_left", "deadlock: 63 threads wait at barrier 0, 1 have ended"),
        ("shuffle_left", "deadlock: 62 threads wait at a shuffle, 2 have ended"),
        (
            "barrier_against_shuffle",
            "comes to a shuffle while thread 0 of its warp waits at barrier 0",
        ),
        (
            "missing_barrier",
            "race: load of row + 0, which thread 0 wrote with no barrier between",
        ),
        ("load_between", "block 0, thread 3: load outside the call's tensors"),
        ("shared_outside", "thread 63: store outside the block's shared memory, 4 bytes past row"),
        ("shared_misaligned", "thread 0: misaligned store of 16 bytes in shared memory"),
        ("two_stores", "thread 1: race: store to row + 0, which thread 0 wrote"),
        ("store_after_load", "race: load of row + 128, which thread 32 wrote with no barrier"),
        ("warp_barrier_missing", "race: load of row + 120, which thread 30 wrote with no barrier"),
        ("atomic_against_load", "race: store to sum + 0, which thread 63 read"),
        ("copy_not_waited", "load of row + 0, where a cp.async of thread 0 has not been waited"),
        ("copy_group_not_waited", "load of row + 256, where a cp.async of thread 0"),
        ("copy_without_barrier", "thread 1: race: load of row + 0, which thread 0 wrote"),
        (
            "copy_over_what_is_read",
            "race: store to row + 132, which thread 32 read with no barrier",
        ),
        ("copy_outside", "thread 16: cp.async outside the call's tensors"),
        ("copy_misaligned", "thread 0: misaligned cp.async of 16 bytes"),
        ("named_barrier_forgotten", "race: load of slot + 0, which thread 0 wrote"),
        (
            "two_barriers",
            "deadlock: 32 threads wait at barrier 1, 32 threads wait at barrier 2, 0 have ended",
        ),
        ("barrier_counts", "barrier 1 of 32 threads, which others use with 64"),
        ("vote_left", "deadlock: 31 threads wait at a vote, 33 have ended"),
        ("mma_left", "deadlock: 62 threads wait at an mma, 2 have ended"),
        ("never_written", "load of dynamic shared memory + 0, which nobody has written"),
    ),
)
def test_simt_reports_a_planted_bug(planted, bug, reported):
    _, message = planted(bug)
    assert message.startswith(f"simt: kernel {bug}, ") and reported in message


@pytest.fixture(scope="module")
def product():
    library = ctypes.CDLL(str(simt.build("matrix", (simt.ROOT / "tests/simt_matrix.cpp",))))

    def run(a, b, a_transposed=False, b_transposed=False, squared=False):
        m, k = a.shape[::-1] if a_transposed else a.shape
        n = b.shape[0] if b_transposed else b.shape[1]
        d = torch.full((m, n), math.nan)
        message = ctypes.create_string_buffer(512)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, d))
        library.ft_simt_product(
            DTYPES.index(a.dtype), *pointers, m, n, k, a_transposed, b_transposed, squared, message
        )
        assert message.value == b""
        return d

    return run


@dtypes
@pytest.mark.parametrize("a_transposed", (False, True), ids=("", "a_transposed"))
@pytest.mark.parametrize("b_transposed", (False, True), ids=("", "b_transposed"))
@pytest.mark.parametrize("m, n, k", ((16, 16, 16), (16, 16, 64), (9, 5, 24), (3, 16, 7)), ids=str)
def test_simt_mma_equals_a_plain_matmul(product, dtype, a_transposed, b_transposed, m, n, k):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    got = product(
        a.T.contiguous() if a_transposed else a,
        b.T.contiguous() if b_transposed else b,
        a_transposed,
        b_transposed,
    )
    want = a.double() @ b.double()
    # 16-bit products are exact; sums are cut to 24 bits. float is split into two tf32: 2^-22 each.
    allowed = 2**-20 * (a.double().abs() @ b.double().abs())
    assert ((got - want).abs() <= allowed).all()


@dtypes
def test_simt_products_in_registers_are_a_left_factor(product, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    got = product(a, b, squared=True)
    first = (a.double() @ b.double()).to(dtype)
    want = first.double() @ b.double()
    step = 2**-20 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((got - want).abs() <= step * (first.double().abs() @ b.double().abs())).all()
