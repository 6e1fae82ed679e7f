"""rms_norm on every backend against float64, forward and gradients."""

import norm_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import DTYPES, RMS_NORM

import fasttransformer as ft
from contract import backends_of, running_on

BACKENDS = backends_of("rms_norm")
on_every_backend = pytest.mark.parametrize("on", BACKENDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_sizes(on, dtype):
    norm_checks.check_sizes(RMS_NORM, on, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_b51_one_feature(on, dtype):
    norm_checks.check_one_feature(RMS_NORM, on, dtype)


@on_every_backend
def test_b44_weights_of_another_dtype(on):
    """intel/intel-extension-for-pytorch#731: the result has the input's dtype on every backend."""
    norm_checks.check_b44_dtypes_of_weights(RMS_NORM, on)


@on_every_backend
def test_b52_any_rank_and_no_weights(on):
    """flagos-ai/FlagGems#5392: the backward assumed 2-D input; no affine crashed."""
    norm_checks.check_b52_shapes(RMS_NORM, on)


@on_every_backend
def test_b52_only_wanted_gradients(on):
    norm_checks.check_b52_only_wanted_gradients(RMS_NORM, on)


@on_every_backend
def test_strides(on):
    norm_checks.check_strides(RMS_NORM, on)


@on_every_backend
def test_nan_stays_in_its_row(on):
    norm_checks.check_nan_stays_in_its_row(RMS_NORM, on)


@on_every_backend
def test_nan_of_any_bits_in_weights(on):
    norm_checks.check_nan_of_any_bits_in_weights(RMS_NORM, on)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b.startswith("cpu")])
def test_gradients_do_not_depend_on_threads(on):
    with running_on(on):
        norm_checks.check_deterministic_gradients(RMS_NORM)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b != "torch"])
def test_operator_of_any_rank(on):
    norm_checks.check_operator_of_any_rank(RMS_NORM, on)


def test_b47_opcheck():
    norm_checks.check_opcheck(RMS_NORM)


def test_compiles_without_a_graph_break():
    norm_checks.check_compile(RMS_NORM)


def test_b46_vmap():
    norm_checks.check_b46_vmap(RMS_NORM)


def test_b69_small_work_stays_on_one_thread():
    norm_checks.check_b69_small_work_on_one_thread(RMS_NORM)


def test_bad_input():
    norm_checks.check_bad_input(RMS_NORM)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_eps_none_is_torchs(dtype):
    x = torch.full((1, 8), 1e-4, dtype=dtype)
    out, want = ft.rms_norm(x, (8,)), torch.nn.functional.rms_norm(x, (8,))
    assert torch.allclose(out, want, rtol=torch.finfo(dtype).eps * 2)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b.startswith("cpu")])
@settings(max_examples=25, deadline=None)
@given(features=st.integers(1, 90), scale=st.floats(0.1, 100), seed=st.integers(0, 2**31))
def test_invariant_to_scale(on, features, scale, seed):
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(seed))
    with running_on(on):
        before, after = (ft.rms_norm(t, (features,), eps=0.0) for t in (x, x * scale))
    assert torch.allclose(before, after, atol=1e-5)
    assert (before.square().mean(-1) - 1).abs().max() < 1e-5
