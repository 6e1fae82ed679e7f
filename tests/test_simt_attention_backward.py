"""Attention backward's CUDA kernels on the CPU: what depends on tiles, grids and shared memory."""

from __future__ import annotations

import pytest
import simt
import torch
from attention_cases import compare, inputs

import fasttransformer as ft
from contract import running_on

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))


def gradients(tensors, on="simt", bias=None, sinks=None, **options):
    leaves = [x.detach().requires_grad_() for x in (*tensors, bias, sinks) if x is not None]
    named = dict(zip([n for n, x in (("bias", bias), ("sinks", sinks)) if x is not None],
                     leaves[3:], strict=True))  # fmt: skip
    with running_on(on):
        out, lse = ft.attention(*leaves[:3], return_lse=True, **named, **options)
        weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
        finite = torch.where(lse.isfinite(), lse, 0).sum()
        return torch.autograd.grad((out * weights).sum() + finite, leaves)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@dtypes
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_edges_of_tiles(dim, dtype):
    """One row under, at and over a warp's rows and a step, with every cut that positions make."""
    for q_len, kv_len in ((15, 65), (16, 64), (33, 31), (64, 17), (66, 128)):
        for options in (
            dict(is_causal=True),
            dict(window=(5, 3), causal_alignment="bottom_right"),
            dict(key_lengths=torch.tensor([kv_len - 1])),
        ):
            compare("simt", inputs(1, 2, 1, q_len, kv_len, dim, dtype=dtype), **options)


@dtypes
@pytest.mark.parametrize("dim", [16, 64, 100, 256])
def test_grid_and_shared_memory_change_no_bit(dim, dtype):
    tensors = inputs(1, 4, 2, 70, 90, dim, dtype=dtype)
    bias, sinks = torch.randn(4, 1, 90), torch.randn(4)
    for options in (
        dict(is_causal=True),
        dict(is_causal=True, bias=bias, sinks=sinks, softcap=2.0, window=(40, 3)),
    ):
        want = gradients(tensors, **options)
        for limits in (
            dict(grid=1),
            dict(grid=3),
            dict(shared=160 * 1024),
            dict(shared=227 * 1024),
        ):
            with simt.limits(**limits):
                assert equal(gradients(tensors, **options), want), limits


@dtypes
@pytest.mark.parametrize("shared", [25, 99, 163, 227], ids=lambda kib: f"{kib}KiB")
def test_shared_memory(shared, dtype):
    """What sm_86, sm_80 and sm_90 have, and so little that one buffer must do."""
    for dim in [32] if shared == 25 else [128, 256]:
        with simt.limits(shared=shared * 1024):
            compare("simt", inputs(1, 1, 1, 33, 70, dim, dtype=dtype), is_causal=True)


@dtypes
def test_rows_that_begin_anywhere(dtype):
    """Rows of odd length, of a wider buffer, and behind an odd offset: no chunk is aligned."""
    for dim, value_dim in ((7, 9), (33, 20), (100, 31)):
        compare("simt", inputs(1, 2, 1, 19, 37, dim, value_dim, dtype))
    wide = torch.randn(1, 2, 40, 80).to(dtype)
    for offset in (1, 2, 8):
        tensors = [wide[..., offset : offset + 40], wide[:, :, 1:, 3:43], wide[:, :, 1:, :40]]
        compare("simt", tensors, is_causal=True)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4, 70, 1), (1, 1, 70, 150),
                                   (1, 4, 1, 150), (2, 4, 70, 150)], ids=str)  # fmt: skip
def test_d_bias_over_tiles(shape, dtype):
    """More tiles than one in each direction, parts, and positions that leave tiles out."""
    bias = torch.randn(shape)
    tensors = inputs(2, 4, 2, 70, 150, 16, 70, dtype)
    if shape[1:] == (1, 1, 1):  # it moves every lse by as much, and no output
        (grad,) = gradients(tensors, bias=bias)[3:]
        rows = 2 / shape[0] * 4 * 70
        torch.testing.assert_close(grad, torch.full(shape, rows), rtol=1e-3, atol=0)
        return
    compare("simt", tensors, bias=bias, is_causal=True, causal_alignment="bottom_right")
    compare("simt", tensors, bias=bias, key_lengths=torch.tensor([100, 0]), window=(30, 9))


@dtypes
def test_nan_stays_with_its_query(dtype):
    query, key, value = inputs(1, 2, 1, 40, 70, 16, dtype=dtype)
    clean = gradients((query, key, value))[0]
    query[0, 1, 7] = torch.nan
    found = gradients((query, key, value))[0]
    assert found[0, 1, 7].isnan().all()
    keep = torch.ones(1, 2, 40, dtype=torch.bool)
    keep[0, 1, 7] = False
    assert torch.equal(found[keep], clean[keep])


@dtypes
@pytest.mark.parametrize("option", ["key_lengths", "mask", "window"])
def test_rows_without_keys(option, dtype):
    tensors = inputs(2, 2, 1, 33, 40, 16, dtype=dtype)
    tensors[1][0, :, 35:] = torch.nan  # keys that no query sees
    tensors[2][0, :, 35:] = torch.nan
    options = {
        "key_lengths": dict(key_lengths=torch.tensor([35, 0])),
        "mask": dict(key_lengths=torch.tensor([35, 40]), mask=(torch.arange(33) % 3 > 0)[:, None]),
        "window": dict(key_lengths=torch.tensor([35, 40]), window=(0, 0)),
    }[option]
    found = gradients(tensors, **options)
    assert all(x.isfinite().all() for x in found)
    assert not found[1][0, :, 35:].any() and not found[2][0, :, 35:].any()
    if option == "key_lengths":
        assert not any(x[1].any() for x in found)
