"""The CUDA norms' own source, run on the CPU by csrc/simt: what depends on how a row is laid out.

What every backend must do runs on simt in test_layer_norm.py and its three siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import simt
import torch
from norm_cases import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM, Norm
from torch import Tensor

import contract
from fasttransformer import reference

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

NORMS = (LAYER_NORM, RMS_NORM, ADD_LAYER_NORM, ADD_RMS_NORM)
ADDING = (ADD_LAYER_NORM, ADD_RMS_NORM)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
norms = pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.op)
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[::2], ids=("f32", "bf16"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))


def lanes(dtype: torch.dtype) -> int:
    """The elements of a chunk of 16 bytes."""
    return 16 // dtype.itemsize


def check(
    norm: Norm,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    wider: int = 0,
    limits: dict[str, int] | None = None,
    vectors: Callable[[Tensor], Tensor | None] = lambda vector: vector,
) -> None:
    """Forward and gradients, of rows that lie ``wider`` elements further apart than they are."""
    count = 1 + norm.adds

    def draw() -> list[Tensor | None]:
        inputs = norm.inputs(shape, 1, dtype)
        for i in range(count):
            rows = torch.randn(shape[0], shape[1] + wider * (i + 1)).to(dtype)
            rows[:, wider // 2 : wider // 2 + shape[1]] = inputs[i]
            inputs[i] = rows[:, wider // 2 : wider // 2 + shape[1]]
        return [*inputs[:count], *map(vectors, inputs[count:])]

    options = {} if norm.has_bias else {"eps": 1e-6}
    with simt.limits(**(limits or {})):
        contract.check(
            norm.ours(**options), norm.reference(**options), draw(), on="simt", redraw=draw
        )


@dtypes
@pytest.mark.parametrize("chunks", (8, 16, 32, 64, 128, 256, 512))
@norms
def test_the_edges_of_each_plan(norm, chunks, dtype):
    """The longest row of a plan, aligned and not, and the shortest of the next."""
    most = chunks * lanes(dtype)
    rows = 9 if most < 2000 else 3
    for features in (most, most - lanes(dtype) - 1, most + 1):
        check(norm, (rows, features), dtype)


@dtypes
@pytest.mark.parametrize("chunks", (1024, 2048))
@norms
def test_the_edges_of_what_registers_hold(norm, chunks, dtype):
    """1024 chunks forward, 2048 backward; beyond, rows lie in shared memory."""
    for features in (chunks * lanes(dtype), chunks * lanes(dtype) + 1):
        check(norm, (2, features), dtype)


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [(LAYER_NORM, torch.float32), (ADD_RMS_NORM, torch.bfloat16)],
    ids=["layer_norm-f32", "add_rms_norm-bf16"],
)
def test_262144_columns(norm, dtype):
    check(norm, (1, 262144), dtype)


@two_dtypes
@norms
def test_odd_rows_beyond_the_number_of_groups(norm, dtype):
    """A group then walks over several rows, which must begin at the same place of a chunk."""
    features = 512 * lanes(dtype) + 1
    for rows in (141, 277) if norm is LAYER_NORM else (141,):
        check(norm, (rows, features), dtype)


def test_rounds_of_blocks():
    """Gradients over rows enough for several rounds of blocks, and for the last to be cut short."""
    for features, rows in ((3, 17001), (3, 1100001), (4, 70000)):
        check(RMS_NORM, (rows, features), torch.bfloat16)


@dtypes
@norms
def test_cut_short_grid(norm, dtype):
    for shape in ((70, 24), (37, 77), (9, 1500), (5, 17001)):
        check(norm, shape, dtype, limits={"grid": 2})


@dtypes
@norms
def test_little_shared_memory(norm, dtype):
    """Rows of shared memory that hold one row backward where two don't fit, or a part of one."""
    check(norm, (5, 1000 * lanes(dtype) - 1), dtype, limits={"shared": 60000})
    check(norm, (3, 2049 * lanes(dtype) + 3), dtype, limits={"shared": 4096})


@dtypes
@norms
def test_alignment(norm, dtype):
    """Rows of wider buffers: inputs that are aligned otherwise than one another and the outputs."""
    for wider in (1, 2, 3, 8, 16):
        check(norm, (9, 40), dtype, wider=wider)
        check(norm, (9, 77), dtype, wider=wider)
    check(norm, (3, 700), dtype, wider=5)
    check(norm, (2, 17001), dtype, wider=3)


@pytest.mark.parametrize("weight", DTYPES, ids=("f32", "f16", "bf16"))
@dtypes
@norms
def test_weights_of_another_dtype(norm, dtype, weight):
    # The reference gives gradients in float64 and the peer in the weight's dtype: compared there.
    if dtype != torch.float32 != weight:
        pytest.skip("gradients of 16-bit weights are compared with float32 rows")
    for shape in ((9, 72), (9, 77), (3, 2052), (2, 17001)):
        check(norm, shape, dtype, vectors=lambda vector: vector.to(weight))


@dtypes
@norms
def test_no_weights(norm, dtype):
    for shape in ((9, 72), (9, 77), (2, 17001)):
        check(norm, shape, dtype, vectors=lambda vector: None)


@dtypes
@pytest.mark.parametrize(
    "shape", ((7, 30), (9, 77), (5, 64), (3, 1001), (2, 9001), (2, 17001)), ids=str
)
@pytest.mark.parametrize("with_sum", (False, True), ids=("", "grad_summed"))
@pytest.mark.parametrize("norm", ADDING, ids=lambda n: n.op)
def test_dropout(norm, shape, dtype, with_sum):
    simt.load()
    operators = torch.ops.fasttransformer_simt
    eps, p = 1e-5, 0.3
    seed = torch.tensor([-(2**62) + 12345])
    x, residual, *vectors = norm.inputs(shape, 1, dtype)
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    forward, backward = (getattr(operators, norm.op + part) for part in ("", "_backward"))
    normed, summed, *statistics = forward(x, residual, *vectors, eps, p, seed)
    wanted = [True] * (1 + norm.has_bias)
    got = backward(
        grads[0], grads[1] if with_sum else None, summed, vectors[0], *statistics, p, seed, *wanted
    )

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (residual, x, *vectors)]
        out, total = getattr(reference, norm.op)(
            leaves[1], leaves[0], shape[1:], *leaves[2:], eps, dropout_p=p, seed=seed
        )
        loss = (out * grads[0].to(dtype)).sum()
        if with_sum:
            loss = loss + (total * grads[1].to(dtype)).sum()
        return (out, total), torch.autograd.grad(loss, leaves)

    (want, want_grads), (peer, peer_grads) = run(torch.float64), run(dtype)
    for a, b, c in zip((normed, summed, *got), (*want, *want_grads), (*peer, *peer_grads)):
        contract.assert_close(a, b, c)


def backward_of(norm: Norm, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """The backward operator as a function of which weight gradients are wanted."""
    simt.load()
    operators = torch.ops.fasttransformer_simt
    rows = norm.inputs(shape, 1, dtype)[: 1 + norm.adds]
    vectors, drop = [None] * (1 + norm.has_bias), [0.0, None] if norm.adds else []
    outs = getattr(operators, norm.op)(*rows, *vectors, 1e-5, *drop)
    summed = [None, outs[1]] if norm.adds else [rows[0]]
    statistics = outs[1 + norm.adds :]
    grad = torch.randn(shape).to(dtype)
    backward = getattr(operators, f"{norm.op}_backward")
    return lambda *wanted: backward(grad, *summed, None, *statistics, *drop, *wanted)


@pytest.mark.parametrize("norm", ADDING, ids=lambda n: n.op)
def test_a_seed_without_dropout(norm):
    operators = simt.load() and torch.ops.fasttransformer_simt
    x, residual, *vectors = norm.inputs((5, 20), 1, torch.float32)
    flags = [True] * (1 + norm.has_bias)
    found = []
    for seed in (None, torch.tensor([7])):
        _, summed, *statistics = getattr(operators, norm.op)(x, residual, *vectors, 1e-5, 0.0, seed)
        backward = getattr(operators, f"{norm.op}_backward")
        found.append(backward(x, None, summed, vectors[0], *statistics, 0.0, seed, *flags))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[1][1])


@dtypes
@pytest.mark.parametrize("shape", ((7, 64), (67, 33), (2, 17001)), ids=str)
@norms
def test_unwanted_outputs_and_repeated_bits(norm, dtype, shape):
    backward = backward_of(norm, shape, dtype)
    both = (True,) * (1 + norm.has_bias)
    first = backward(*both)
    with simt.limits(grid=3):
        again = backward(*both)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    if norm.adds:
        assert first[1].shape == (0,)
    assert all(t.shape == (0,) for t in backward(*[False] * len(both))[1:])
    if norm.has_bias:
        *_, weight, bias = first
        assert torch.equal(backward(True, False)[-2], weight)
        assert torch.equal(backward(False, True)[-1], bias)
        assert backward(True, False)[-1].shape == backward(False, True)[-2].shape == (0,)


@norms
def test_no_rows_gives_zero_weight_gradients(norm):
    d_weight = backward_of(norm, (0, 8), torch.float32)(*[True] * (1 + norm.has_bias))[
        1 + norm.adds
    ]
    assert torch.equal(d_weight, torch.zeros(8))


@pytest.mark.parametrize("features", (6, 300, 17001))
@norms
def test_nan_stays_in_its_row(norm, features):
    x = torch.randn(4, features)
    x[1, features // 2] = float("nan")
    inputs = [x, *norm.inputs((4, features), 1, torch.float32)[1:]]
    with contract.running_on("simt"):
        out = norm.ours()(*(t.requires_grad_() for t in inputs))
        out = out[0] if norm.adds else out
        (d_x,) = torch.autograd.grad(out.square().sum(), inputs[0])
    for t in (out, d_x):
        assert t.isnan().all(-1).tolist() == [False, True, False, False]
        assert t.isnan().any(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("features", (40, 77, 9001, 17001))
@pytest.mark.parametrize("norm", ADDING, ids=lambda n: n.op)
def test_gradients_that_lie_anywhere(norm, features):
    """Strided and misaligned gradients and sums give the bits of contiguous ones."""
    simt.load()
    backward = getattr(torch.ops.fasttransformer_simt, f"{norm.op}_backward")
    arrays = [torch.randn(9, features).bfloat16() for _ in range(3)]
    weight = torch.randn(features).bfloat16()
    statistics = [torch.rand(9) + 0.5 for _ in range(1 + norm.has_bias)]

    def run(grad: Tensor, grad_summed: Tensor, summed: Tensor) -> Any:
        flags = [True] * (1 + norm.has_bias)
        return backward(grad, grad_summed, summed, weight, *statistics, 0.0, None, *flags)

    def anywhere(rows: Tensor, at: int) -> Tensor:
        wide = torch.full((9, features + 7 + at), float("nan")).bfloat16()
        wide[:, at : at + features] = rows
        return wide[:, at : at + features]

    want = run(*arrays)
    for places in ((1, 0, 0), (0, 3, 0), (0, 0, 8), (5, 2, 1)):
        got = run(*(anywhere(*pair) for pair in zip(arrays, places)))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
