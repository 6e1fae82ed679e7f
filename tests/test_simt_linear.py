"""CUDA linear_add and its norms on simt: tiles and their edges, splits, both places of the norm,
heads in place forward and backward, alignments, cut-short grids, little shared memory."""

from __future__ import annotations

import itertools

import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.ops._activation import CODES

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f16", "bf16"))
A100 = 163 * 1024  # bytes of shared memory: float goes by tensor cores there
NORMS = {
    "layer": (ft.linear_add_layer_norm, reference.linear_add_layer_norm),
    "rms": (ft.linear_add_rms_norm, reference.linear_add_rms_norm),
}


def problem(rows, i, o, dtype):
    """input, weight, bias, residual."""
    return [t.to(dtype) for t in (
        torch.randn(rows, i), torch.randn(o, i) * max(i, 1) ** -0.5, torch.randn(o),
        torch.randn(rows, o))]  # fmt: skip


def linear_check(inputs, *, grads=True, activation=None, **limits):
    with simt.limits(**limits):
        contract.check(
            lambda *a: ft.linear_add(*a, activation=activation),
            lambda *a: reference.linear_add(*a, activation=activation),
            inputs, on="simt", grads=grads,
        )  # fmt: skip


def norm_check(name, inputs):
    """Both forms of the result."""
    norm, expected = NORMS[name]
    vectors = [torch.randn(inputs[1].shape[0]) for _ in range(2 if name == "layer" else 1)]
    for return_sum in (True, False):
        contract.check(
            lambda *a, wanted=return_sum: norm(*a, return_sum=wanted),
            lambda *a, wanted=return_sum: expected(*a, return_sum=wanted),
            (*inputs, *vectors), on="simt", grads=False,
        )  # fmt: skip


# One multiprocessor: few tiles are no reason for small ones, so the large tile is taken.
@dtypes
@pytest.mark.parametrize("shape", [
    (128, 96, 128), (129, 65, 127), (257, 130, 130), (200, 8, 300), (127, 1, 129),
], ids=str)  # fmt: skip
def test_large_tiles(shape, dtype):
    linear_check(problem(*shape, dtype), multiprocessors=1, shared=A100)


@dtypes
@pytest.mark.parametrize("shape", [(64, 64, 64), (65, 63, 66), (17, 200, 8), (40, 100, 130)],
                         ids=str)  # fmt: skip
def test_medium_tiles(shape, dtype):
    linear_check(problem(*shape, dtype), multiprocessors=1000, shared=A100)


# Few rows: warps share K; 256 of 16 bits, 128 of 32, make a tile.
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 15, 16])
@pytest.mark.parametrize("sizes", [(256, 32), (255, 33), (700, 40), (1, 5)], ids=str)
def test_few_rows(sizes, rows, dtype):
    linear_check(problem(rows, *sizes, dtype), activation="gelu", grads=False, shared=A100)


# Short of tiles and long of K: its parts are summed by a second kernel, with the epilogue.
@dtypes
@pytest.mark.parametrize("shape", [(40, 3000, 24), (9, 5000, 7), (70, 2999, 70)], ids=str)
def test_split_k(shape, dtype):
    inputs = problem(*shape, dtype)
    linear_check(inputs, multiprocessors=500, shared=A100, activation="silu", grads=False)
    with simt.limits(multiprocessors=500, shared=A100):
        for name in NORMS:
            norm_check(name, inputs)


@dtypes
def test_split_of_the_weights_gradient(dtype):
    linear_check(problem(2500, 20, 12, dtype), multiprocessors=500, shared=A100)


@dtypes
@pytest.mark.parametrize("limits", [
    {"grid": 1}, {"grid": 3}, {"shared": 48 * 1024}, {"shared": 34 * 1024},
    {"shared": 227 * 1024}, {"grid": 2, "multiprocessors": 1},
], ids=str)  # fmt: skip
def test_grids_and_shared_memory(limits, dtype):
    linear_check(problem(150, 300, 140, dtype), **limits)
    for name in NORMS:
        with simt.limits(**limits):
            norm_check(name, problem(150, 70, 140, dtype))


# Sources that start 2 or 4 bytes off, or whose rows do: elements, pairs, or chunks.
@dtypes
@pytest.mark.parametrize("step", [1, 2, 8])
@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_alignments(start, step, dtype):
    rows, i, o = 21, 88, 40
    wide = torch.randn(rows, i + step + start).to(dtype)[:, start : start + i]
    _, weight, bias, _ = problem(rows, i, o, dtype)
    flat = torch.randn(o * i + start).to(dtype)
    weight = flat[start:].view(o, i)
    residual = torch.randn(rows, o + step + start).to(dtype)[:, start : start + o]
    inputs = (wide, weight, bias, residual)
    with contract.running_on("simt"), simt.limits(shared=A100):
        got = ft.linear_add(*inputs)
        want = ft.linear_add(*(t.clone() for t in inputs))
    assert torch.equal(got, want)
    leaves = [t.detach().requires_grad_() for t in inputs]
    copies = [t.clone().detach().requires_grad_() for t in inputs]
    with contract.running_on("simt"):
        ours = torch.autograd.grad(ft.linear_add(*leaves).square().sum(), leaves)
        theirs = torch.autograd.grad(ft.linear_add(*copies).square().sum(), copies)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


# Heads split rows of 16 bytes or not; the operator's own gradients, in the input's layout.
@dtypes
@pytest.mark.parametrize("sizes", [(2, 3, 5, 8), (2, 4, 70, 16), (3, 2, 33, 5), (1, 6, 9, 12),
                                   (2, 1, 7, 24), (2, 3, 1, 32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("heads_last", [False, True])
def test_heads_in_place(heads_last, sizes, dtype):
    b, h, s, e = sizes
    o = 44
    x = torch.randn(b, s, h, e).transpose(1, 2) if heads_last else torch.randn(b, h, s, e)
    x, weight, grad = x.to(dtype), torch.randn(o, h * e).to(dtype), torch.randn(b, s, o).to(dtype)
    joined = x.transpose(1, 2).reshape(b * s, h * e)
    ops = torch.ops.fasttransformer_simt
    simt.load()
    with simt.limits(shared=A100):
        out = ops.linear_add(x, weight, None, grad, CODES[""])
        rows = ops.linear_add(joined, weight, None, grad.view(b * s, o), CODES[""])
        assert torch.equal(out.view(b * s, o), rows)
        d_input, d_weight, d_bias = ops.linear_add_backward(grad, x, weight, True, True, True)
        wanted = ops.linear_add_backward(grad.view(b * s, o), joined, weight, True, True, True)
    assert d_input.shape == x.shape
    assert torch.equal(d_input.transpose(1, 2).reshape(b * s, h * e), wanted[0])
    assert torch.equal(d_weight, wanted[1])
    assert torch.equal(d_bias, wanted[2])


# Rows that fit a tile are normed there when there are enough of them; wider or fewer are not.
@dtypes
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(130, 40, 256), (65, 40, 250), (130, 24, 257), (70, 33, 512),
                                   (66, 40, 509), (64, 17, 3), (70, 40, 520)], ids=str)  # fmt: skip
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_norms(multiprocessors, shape, name, dtype):
    with simt.limits(multiprocessors=multiprocessors):
        norm_check(name, problem(*shape, dtype))


def test_both_places_of_the_norm_give_the_same_sum():
    inputs = problem(130, 40, 200, torch.bfloat16)
    found = []
    for multiprocessors in (1, 1000):
        with contract.running_on("simt"), simt.limits(multiprocessors=multiprocessors):
            found.append(ft.linear_add_layer_norm(*inputs))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0])


@dtypes
@pytest.mark.parametrize("large", [False, True])
def test_infinities_are_exact(large, dtype):
    """tf32 products would make NaN of an infinity; it must be told from a true one."""
    x, weight, bias, residual = problem(20, 100, 30, dtype)
    x[3, 5] = float("inf")
    x[4, 6] = -float("inf")
    x[7, 1], x[7, 2] = float("inf"), float("nan")
    with contract.running_on("simt"), simt.limits(shared=A100, multiprocessors=1 if large else 99):
        got = ft.linear_add(x, weight, bias, residual)
    want = reference.linear_add(*(t.double() for t in (x, weight, bias, residual)))
    for row in (3, 4, 7):
        if row == 7:
            assert got[row].isnan().all()
        else:
            assert torch.equal(got[row].double(), want[row])
    others = [r for r in range(20) if r not in (3, 4, 7)]
    assert got[others].isfinite().all()


def test_the_same_bits_every_time():
    inputs = problem(300, 900, 40, torch.bfloat16)
    runs = []
    for grid in (simt.GRID, 5):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with contract.running_on("simt"), simt.limits(grid=grid):
            out = ft.linear_add(*leaves)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for a, b in itertools.pairwise(runs):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
