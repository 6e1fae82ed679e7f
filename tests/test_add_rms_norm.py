"""add_rms_norm on every backend against float64, forward and gradients."""

import norm_checks
import pytest
import torch
from norm_cases import ADD_RMS_NORM, DTYPES

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops._front import new_seed

BACKENDS = backends_of("add_rms_norm")
on_every_backend = pytest.mark.parametrize("on", BACKENDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_sizes(on, dtype):
    norm_checks.check_sizes(ADD_RMS_NORM, on, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_b51_one_feature(on, dtype):
    norm_checks.check_one_feature(ADD_RMS_NORM, on, dtype)


@on_every_backend
def test_b44_weights_of_another_dtype(on):
    """intel/intel-extension-for-pytorch#731: the result has the input's dtype on every backend."""
    norm_checks.check_b44_dtypes_of_weights(ADD_RMS_NORM, on)


@on_every_backend
def test_b52_any_rank_and_no_weights(on):
    """flagos-ai/FlagGems#5392: the backward assumed 2-D input; no affine crashed."""
    norm_checks.check_b52_shapes(ADD_RMS_NORM, on)


@on_every_backend
def test_b52_only_wanted_gradients(on):
    norm_checks.check_b52_only_wanted_gradients(ADD_RMS_NORM, on)


@on_every_backend
def test_strides(on):
    norm_checks.check_strides(ADD_RMS_NORM, on)


@on_every_backend
def test_nan_stays_in_its_row(on):
    norm_checks.check_nan_stays_in_its_row(ADD_RMS_NORM, on)


@on_every_backend
def test_nan_of_any_bits_in_weights(on):
    norm_checks.check_nan_of_any_bits_in_weights(ADD_RMS_NORM, on)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b.startswith("cpu")])
def test_gradients_do_not_depend_on_threads(on):
    with running_on(on):
        norm_checks.check_deterministic_gradients(ADD_RMS_NORM)


@pytest.mark.parametrize("on", [b for b in BACKENDS if b != "torch"])
def test_operator_of_any_rank(on):
    norm_checks.check_operator_of_any_rank(ADD_RMS_NORM, on)


def test_b47_opcheck():
    norm_checks.check_opcheck(ADD_RMS_NORM)


def test_compiles_without_a_graph_break():
    norm_checks.check_compile(ADD_RMS_NORM)


def test_b46_vmap():
    norm_checks.check_b46_vmap(ADD_RMS_NORM)


def test_b69_small_work_stays_on_one_thread():
    norm_checks.check_b69_small_work_on_one_thread(ADD_RMS_NORM)


def test_bad_input():
    norm_checks.check_bad_input(ADD_RMS_NORM)


@pytest.mark.parametrize("shape", [(1, 5), (6, 33), (7, 130)], ids=str)
@on_every_backend
def test_dropout_is_the_references(on, shape):
    """The mask is a function of (seed, position), equal on every backend, in both directions."""
    tensors = ADD_RMS_NORM.inputs(shape, 1, torch.float32)
    with running_on(on):
        torch.manual_seed(3)
        found = new_seed(torch.device("cpu"))
        torch.manual_seed(3)
        leaves = [t.requires_grad_() for t in tensors]
        outs = ft.add_rms_norm(*leaves[:2], shape[1:], *leaves[2:], dropout_p=0.3)
        cotangents = [torch.randn(shape) for _ in outs]
        loss = sum((o.cpu() * c).sum() for o, c in zip(outs, cotangents))
        grads = torch.autograd.grad(loss, leaves)
    leaves = [t.double().requires_grad_() for t in tensors]
    wants = reference.add_rms_norm(
        *leaves[:2],
        shape[1:],
        *leaves[2:],
        dropout_p=0.3,
        seed=found.cpu(),
        eps=torch.finfo(torch.float32).eps,
    )
    loss = sum((o * c).sum() for o, c in zip(wants, cotangents))
    for a, b in zip((*outs, *grads), (*wants, *torch.autograd.grad(loss, leaves))):
        assert torch.allclose(a.detach().cpu().double(), b.detach(), atol=2e-5, rtol=1e-5)
    keep = reference.dropout_mask(found.cpu(), shape, 0.3)
    assert torch.equal(grads[0].cpu().ne(0), keep)


@on_every_backend
def test_dropout_of_bfloat16_and_its_rate(on):
    x = torch.ones(4 if on == "triton" else 400, 100, dtype=torch.bfloat16)
    with running_on(on):
        _, summed = ft.add_rms_norm(x, torch.zeros_like(x), 100, dropout_p=0.25)
    kept = summed[summed != 0].float()
    assert (kept - 4 / 3).abs().max() <= 2**-8
    assert abs((summed == 0).float().mean().item() - 0.25) < (0.1 if on == "triton" else 0.01)


@on_every_backend
def test_gradient_of_one_output_alone(on):
    for pick in (0, 1):
        check(
            lambda *t, pick=pick: ADD_RMS_NORM.ours()(*t)[pick],
            lambda *t, pick=pick: ADD_RMS_NORM.reference()(*t)[pick],
            ADD_RMS_NORM.inputs((5, 20), 1, torch.float32),
            on=on,
        )


def test_autocast_promotes_a_narrow_projection():
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    with torch.autocast("cpu"):
        normed, summed = ft.add_rms_norm(x, residual, 8)
    assert normed.dtype == summed.dtype == torch.float32
