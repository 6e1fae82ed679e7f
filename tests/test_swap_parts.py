"""What is done to the parts of a swapped model: hooks, pruning, parametrizations, replaced parts.

Each test does the same to a model and to its swapped twin.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from swap_model import D, close, encoder, twins
from torch import nn
from torch.nn.utils import parametrize, prune

import fasttransformer as ft
from fasttransformer.patterns import swapped_from

# ---- hooks, pruning, parametrizations, replaced parts -------------------------------------------


def hook(module):
    module.register_forward_hook(lambda m, args, out: out * 1.5)


def pre_hook(module):
    module.register_forward_pre_hook(lambda m, args: (args[0] + 0.5,))


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 1.5


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


def pruned_for_good(module):
    pruned(module)
    prune.remove(module, "weight")


def weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module)
    with torch.no_grad():
        module.weight_g.mul_(1.5)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Half())


def attribute(module):
    weight = module.weight.detach() * 2
    del module.weight
    module.weight = weight


ADDED = [hook, pre_hook, replaced_forward, pruned, pruned_for_good, weight_norm, parametrized,
         attribute]  # fmt: skip
#: name of a model → its parts that have a weight
PARTS = {
    "Linear": ["0"],
    "LayerNorm": ["0"],
    "RMSNorm": ["0"],
    "TransformerEncoderLayer": ["0.linear1", "0.linear2", "0.norm1", "0.norm2"],
}


@pytest.mark.parametrize("add", ADDED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("kind", "part"), [(k, p) for k, ps in PARTS.items() for p in ps])
def test_what_is_added_after_the_swap(kind, part, add):
    if add is weight_norm and "norm" in (kind + part).lower():
        pytest.skip("weight_norm is of matrices")
    original, swapped = twins(kind)
    original.train(), swapped.train()
    x = torch.randn(2, 5, D)
    before = original(x)
    for model in (original, swapped):
        with torch.no_grad():  # a norm's weights are all 1: pruned of none, or of any
            weight = model.get_submodule(part).weight
            weight.add_(torch.linspace(-0.4, 0.4, weight.shape[-1]))
        add(model.get_submodule(part))
    want = original(x)
    assert not torch.allclose(want, before, atol=1e-3)
    close(swapped(x), want)
    for model in (original, swapped):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        model.grads = {"x": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}
    for name, grad in original.grads.items():
        torch.testing.assert_close(swapped.grads[name], grad, atol=1e-3, rtol=1e-3)
    ft.restore(swapped)
    assert not any(swapped_from(m) for m in swapped.modules())
    if add is not replaced_forward:  # which holds on to the forward that the swapped class had
        assert torch.equal(swapped(x), want)


@pytest.mark.parametrize("remove", [False, True])
def test_restore_below_a_parametrization(remove):
    """The class that a parametrization derives from a swapped one goes back with it."""
    original, swapped = twins("Linear")
    parametrized(original[0]), parametrized(swapped[0])
    assert ft.swap(swapped).already == ("0",)
    assert ft.restore(swapped) == 1
    assert type(swapped[0]).__mro__[1] is nn.Linear
    if remove:
        parametrize.remove_parametrizations(swapped[0], "weight")
        parametrize.remove_parametrizations(original[0], "weight")
        assert type(swapped[0]) is nn.Linear
    x = torch.randn(3, D)
    assert torch.equal(swapped(x), original(x))


def test_verify_below_a_parametrization_compares_with_the_original():
    class Wrong(ft.nn.Linear):
        _ft_swapped_from = nn.Linear

        def forward(self, x):
            return super().forward(x) * 1.01

    model = nn.Sequential(nn.Linear(D, D))
    report = ft.swap(model)
    model[0].__class__ = Wrong
    parametrized(model[0])
    assert not report.verify(torch.randn(4, D), show=False).ok


class Wrapped(nn.Module):
    """A LoRA-like adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_b107_adapters_in_a_layer(part, when):
    """b107 (peft#2556): adapters on linear layers whose weight a fused kernel reads."""
    torch.manual_seed(1)
    original = encoder().train()
    swapped = copy.deepcopy(original)
    adapter = Wrapped(getattr(original, part))
    if when == "after":
        ft.swap(swapped)
    ours = Wrapped(getattr(swapped, part))
    ours.down.load_state_dict(adapter.down.state_dict())
    ours.up.load_state_dict(adapter.up.state_dict())
    setattr(original, part, adapter)
    setattr(swapped, part, ours)
    if when == "before":
        ft.swap(swapped)
    x = torch.randn(2, 5, D)
    close(swapped(x), original(x))
    for model in (original, swapped):
        model(x).square().sum().backward()
    close(ours.up.weight.grad, adapter.up.weight.grad)


@pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["Linear", "LayerNorm", "TransformerEncoderLayer"])
def test_a_forward_that_is_replaced_on_torchs_class(kind, cls, monkeypatch):
    original, swapped = twins(kind)
    original.train(), swapped.train()
    x = torch.randn(2, 5, D)
    before, forward = original(x), cls.forward
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, x: forward(self, x) * 1.5)
        want = original(x)
        assert torch.equal(want, before) == (kind not in (cls.__name__, "TransformerEncoderLayer"))
        close(swapped(x), want)
        fresh = copy.deepcopy(original)
        reasons = {s.reason for s in ft.swap(fresh).skipped}
        assert (f"the forward of torch.nn.{cls.__name__} is replaced" in reasons) == (
            kind in (cls.__name__, "TransformerEncoderLayer")
        )
        close(fresh(x), want)
    close(swapped(x), before)


def test_replaced_parts_and_changed_attributes():
    torch.manual_seed(1)
    new = {
        "linear1": nn.Linear(D, 24),
        "linear2": nn.Linear(24, D, bias=False),
        "norm1": nn.RMSNorm(D),
        "norm2": nn.Identity(),
        "dropout1": nn.Identity(),
        "activation": nn.functional.silu,
    }
    original, swapped = twins("TransformerEncoderLayer")
    original.train(), swapped.train()
    x = torch.randn(2, 5, D)
    for name, part in new.items():
        for model in (original, swapped):
            setattr(model[0], name, copy.deepcopy(part))
        if name != "linear1":  # its width fits with linear2 only
            close(swapped(x), original(x))
    for model in (original, swapped):
        model[0].norm_first = True
        model[0].norm1.eps = 0.5
    close(swapped(x), original(x))


@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_our_own_feed_forward_calls_what_is_not_plain(part):
    block = ft.nn.FeedForward(D, 32)
    x = torch.randn(3, D)
    h = block.linear1(x)
    h = h * 1.5 if part == "linear1" else h
    want = block.linear2(nn.functional.gelu(h)) * (1.5 if part == "linear2" else 1)
    hook(getattr(block, part))
    close(block(x), want)


def test_our_own_output_projection_calls_a_norm_that_is_not_plain():
    block = ft.nn.OutputProjection(D, D, norm="layer")
    x, residual = torch.randn(2, 3, D)
    normed, summed = block(x, residual)
    hook(block.norm)
    close(block(x, residual)[0], normed * 1.5)
    close(block(x, residual)[1], summed)
