"""layer_norm on every backend against float64, forward and gradients."""

import norm_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import DTYPES, LAYER_NORM

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference

BACKENDS = backends_of("layer_norm")
on_every_backend = pytest.mark.parametrize("on", BACKENDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_sizes(on, dtype):
    norm_checks.check_sizes(LAYER_NORM, on, dtype)


@on_every_backend
def test_b44_weights_of_another_dtype(on):
    """intel/intel-extension-for-pytorch#731: the result has the input's dtype on every backend."""
    norm_checks.check_b44_dtypes_of_weights(LAYER_NORM, on)


@on_every_backend
def test_b52_any_rank_and_no_weights(on):
    """flagos-ai/FlagGems#5392: the backward assumed 2-D input; no affine crashed."""
    norm_checks.check_b52_shapes(LAYER_NORM, on)


@on_every_backend
def test_b52_only_wanted_gradients(on):
    norm_checks.check_b52_only_wanted_gradients(LAYER_NORM, on)


@on_every_backend
def test_strides(on):
    norm_checks.check_strides(LAYER_NORM, on)


@on_every_backend
def test_nan_stays_in_its_row(on):
    norm_checks.check_nan_stays_in_its_row(LAYER_NORM, on)


@on_every_backend
def test_nan_of_any_bits_in_weights(on):
    norm_checks.check_nan_of_any_bits_in_weights(LAYER_NORM, on)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b.startswith("cpu")])
def test_gradients_do_not_depend_on_threads(on):
    with running_on(on):
        norm_checks.check_deterministic_gradients(LAYER_NORM)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b != "torch"])
def test_operator_of_any_rank(on):
    norm_checks.check_operator_of_any_rank(LAYER_NORM, on)


def test_b47_opcheck():
    norm_checks.check_opcheck(LAYER_NORM)


def test_compiles_without_a_graph_break():
    norm_checks.check_compile(LAYER_NORM)


def test_b46_vmap():
    norm_checks.check_b46_vmap(LAYER_NORM)


def test_b69_small_work_stays_on_one_thread():
    norm_checks.check_b69_small_work_on_one_thread(LAYER_NORM)


def test_bad_input():
    norm_checks.check_bad_input(LAYER_NORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_b51_one_feature(on, dtype):
    """pytorch/pytorch#188372: with one feature the output is the bias, gradients of x, weight 0."""
    x = torch.tensor([1e6], dtype=dtype)
    tensors = [x, torch.tensor([2.0]).to(dtype), torch.tensor([3.0]).to(dtype)]
    with running_on(on):
        x, weight, bias = (t.requires_grad_() for t in tensors)
        out = ft.layer_norm(x, (1,), weight, bias)
        out.sum().backward()
    assert out.item() == 3.0
    assert (weight.grad.item(), x.grad.item(), bias.grad.item()) == (0.0, 0.0, 1.0)


@on_every_backend
def test_mean_far_from_zero(on):
    """The variance is that of centred values: a large mean costs no digits."""
    for features in (48, 1000) if on != "triton" else (48,):
        x = torch.randn(5, features) + torch.tensor([[0.0], [1e2], [-1e4], [1e6], [3e7]])
        x[0, :64] += 50  # the first values are a bad guess at the mean
        check(
            lambda x, n=features: ft.layer_norm(x, (n,)),
            lambda x, n=features: reference.layer_norm(x, (n,)),
            [x],
            on=on,
        )


@pytest.mark.parametrize("on", [b for b in BACKENDS if b.startswith("cpu")])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    features=st.integers(8, 90),
    scale=st.floats(0.5, 20),
    shift=st.floats(-20, 20),
    seed=st.integers(0, 2**31),
)
def test_invariant_to_affine_input_change(on, rows, features, scale, shift, seed):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    with running_on(on):
        before = ft.layer_norm(x, (features,), eps=0.0)
        after = ft.layer_norm(x * scale + shift, (features,), eps=0.0)
    assert torch.allclose(before, after, atol=2e-3)
    assert before.mean(-1).abs().max() < 1e-5
    assert (before.square().mean(-1) - 1).abs().max() < 1e-4
