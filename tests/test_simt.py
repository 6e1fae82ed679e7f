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
            # Of few numbers the peer may be right by luck: then draws of about the same decide.
            redraw=lambda: [(inputs * (1 + 0.05 * torch.randn(inputs.shape))).to(inputs.dtype)],
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
@pytest.mark.parametrize("shared", (2048, 4096, 20000), ids=lambda s: f"{s}B")
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


# ---- simt itself --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    library = simt.opened(simt.build("bugs", (simt.ROOT / "tests/simt_bugs.cpp",)))

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
    library = simt.opened(simt.build("matrix", (simt.ROOT / "tests/simt_matrix.cpp",)))

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
