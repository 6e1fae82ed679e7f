"""Whether each card takes every launch: shared memory, registers, blocks and grids of the CUDA
kernels under the limits of sm_80, sm_86 and sm_90, over very many sizes.

Launches are held to the card's limits and not carried out (``simt.launch_only``), so that a sweep
costs what its calls cost. What nvcc made of each kernel is in tests/cuda_resources.json.
"""

from __future__ import annotations

import itertools
import threading

import launches
import pytest
import simt
import torch

import fasttransformer as ft
from contract import running_on

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
cards = pytest.mark.parametrize("card", simt.CARDS)


def columns_for(dtype):
    """Rows of few columns, at the ends of the plans' tables, and of about 24, 48 or 96 KB or all
    that a card has, chunk by chunk: where a kernel's static bytes pass a limit."""
    size = dtype.itemsize
    edges = [
        bytes_ // size + around
        for bytes_ in (24 << 10, 48 << 10, 96 << 10, *(c.shared for c in simt.CARDS.values()))
        for around in range(-2300 // size, 32 // size, 16 // size)
    ]
    ends = (2**i + d for i in range(4, 16) for d in (-1, 0, 1))
    return sorted({*range(1, 300, 7), *ends, *edges})


@pytest.fixture
def checked(card, request):
    """Within the test, launches are only held to the card's limits; each operation that the test
    names in OPERATIONS makes some, forward and backward."""
    with simt.limits(simt.CARDS[card]), simt.launch_only(), launches.recorded() as launched:
        with running_on("simt"):
            yield
    for op in OPERATIONS[request.function.__name__]:
        launched.require("simt", op, backward=True)


OPERATIONS = {
    "test_rows": ("softmax", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "test_attention": ("attention",),
    "test_the_other_operations": (
        "cross_entropy", "embedding", "merge_attention", "feed_forward", "rotary_embedding",
    ),
}  # fmt: skip


def gradients(out, *inputs):
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    torch.autograd.grad(outs, wanted, [torch.empty_like(o) for o in outs], allow_unused=True)


def leaf(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, requires_grad=True)


@cards
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))
def test_rows(checked, dtype):
    for columns in columns_for(dtype):
        x, weight = leaf(2, columns, dtype=dtype), leaf(columns)
        gradients(ft.softmax(x), x)
        gradients(ft.layer_norm(x, (columns,), weight, weight), x, weight)
        gradients(ft.rms_norm(x, (columns,), weight), x, weight)
        y = leaf(2, columns, dtype=dtype)
        gradients(ft.add_layer_norm(x, y, (columns,), weight, weight), x, y, weight)
        gradients(ft.add_rms_norm(x, y, (columns,), weight), x, y, weight)


@cards
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))
def test_attention(checked, dtype):
    """Each head size; the plain, the general and the few rows' kernel; every backward walk."""
    for dim in range(1, 257):
        for q_len, kv_len in ((1, 70), (17, 5), (200, 300)):
            q = leaf(1, 4, q_len, dim, dtype=dtype)
            k = leaf(1, 2, kv_len, dim, dtype=dtype)
            bias = leaf(4, 1, kv_len)
            mask = torch.ones(q_len, kv_len, dtype=torch.bool)
            gradients(ft.attention(q, k, k, is_causal=True), q, k)
            gradients(ft.attention(q, k, k, mask=mask), q, k)
            gradients(ft.attention(q, k, k, bias=bias, sinks=leaf(4), window=(9, 9)), q, k, bias)
        v = leaf(1, 2, kv_len, 257 - dim, dtype=dtype)
        gradients(ft.attention(q, k, v, softcap=3.0, dropout_p=0.1), q, k, v)


@cards
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))
@pytest.mark.parametrize("multiprocessors", [1, None, 100_000])
def test_products(card, dtype, multiprocessors):
    """Each tile, with as many stages as the card has room for, in splits, and with norms."""
    changes = {} if multiprocessors is None else {"multiprocessors": multiprocessors}
    with (
        launches.recorded() as launched,
        simt.limits(simt.CARDS[card], **changes),
        simt.launch_only(),
        running_on("simt"),
    ):
        sizes = (1, 16, 17, 64, 129, 1000)
        for rows, i, o in itertools.product(sizes, (1, 40, 300, 5000), (1, 33, 256, 257, 512, 513)):
            x, w = leaf(rows, i, dtype=dtype), leaf(o, i, dtype=dtype)
            bias, y = leaf(o, dtype=dtype), leaf(rows, o, dtype=dtype)
            gradients(ft.linear_add(x, w, bias, y, activation="gelu"), x, w, bias, y)
            n = leaf(o)
            gradients(ft.linear_add_layer_norm(x, w, bias, y, n, n), x, w, bias, y, n)
            gradients(ft.linear_add_rms_norm(x, w, bias, y, n), x, w, bias, y, n)
    for op in ("linear_add", "linear_add_layer_norm", "linear_add_rms_norm"):
        launched.require("simt", op, backward=True)


@cards
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))
def test_the_other_operations(checked, dtype):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for columns in (*range(1, 300, 13), *(2**i + d for i in range(8, 18) for d in (-1, 0, 1))):
        x = leaf(2, columns, dtype=dtype)
        gradients(ft.cross_entropy(x, ids[0, :2] * 0, label_smoothing=0.1), x)
        table = leaf(5, columns, dtype=dtype)
        gradients(ft.embedding(ids, table), table)
        out = leaf(1, 2, 3, columns, dtype=dtype)
        lse = leaf(1, 2, 3)
        gradients(ft.merge_attention([out, out], [lse, lse]), out, lse)
        wide = leaf(3, 2 * columns, dtype=dtype)
        w_in, w_out = leaf(2 * columns, 1, dtype=dtype), leaf(1, columns, dtype=dtype)
        gradients(ft.feed_forward(wide[:, :1], w_in, None, w_out, None, activation="swiglu"), wide)
    for dim in range(2, 257, 2):
        q = leaf(1, 3, 5, dim, dtype=dtype)
        angle = torch.zeros(5, dim // 2)
        gradients(ft.rotary_embedding(q, q, angle, angle), q)


def test_one_launch_needs_the_raised_limit_and_the_next_has_it():
    """49,152 bytes of dynamic shared memory with 112 static ones: attention at head size 128."""
    q = torch.randn(1, 1, 70, 128).bfloat16()
    mask = torch.ones(70, 70, dtype=torch.bool)
    for card in simt.CARDS.values():
        with simt.limits(card), running_on("simt"):
            outs = [ft.attention(q, q, q, mask=mask) for _ in range(2)]
            assert torch.equal(*outs)


@pytest.mark.parametrize("columns", [24_519, 24_520, 24_550, 24_576, 24_577])
@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_softmax_at_48_kilobytes(columns, card):
    x = torch.randn(2, columns).bfloat16()
    with simt.limits(simt.CARDS[card]), running_on("simt"):
        out = ft.softmax(x)
    torch.testing.assert_close(out, torch.softmax(x, -1), atol=1e-4, rtol=1e-2)


def test_threads_that_launch_one_kernel_with_several_sizes():
    """What each raises is the same, so none takes another's limit away."""
    inputs = [torch.randn(1, columns) for columns in (13_000, 16_000, 20_000, 24_000)] * 3
    found, errors = [None] * len(inputs), []

    def run(i):
        try:
            for _ in range(3):
                found[i] = torch.ops.fasttransformer_simt.softmax(
                    inputs[i], 1.0, None, False, False
                )
        except RuntimeError as error:
            errors.append(error)

    with simt.limits(simt.CARDS["sm_90"]):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for out, x in zip(found, inputs):
        torch.testing.assert_close(out, torch.softmax(x, -1))
