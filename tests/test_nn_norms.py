"""ft.nn's norms, softmax, linear, output projection and feed-forward."""

import copy
import pickle

import modules
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft
from fasttransformer import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randomized(module: nn.Module, dtype=torch.float32) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (4, 8)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: nn.LayerNorm(shape),
        lambda shape: nn.LayerNorm(shape, eps=1e-2, bias=False),
        lambda shape: nn.LayerNorm(shape, elementwise_affine=False),
        lambda shape: nn.RMSNorm(shape),
        lambda shape: nn.RMSNorm(shape, eps=1e-2),
        lambda shape: nn.RMSNorm(shape, elementwise_affine=False),
    ],
)
def test_norms_against_torch(make, shape, dtype):
    norm = randomized(make(shape), dtype)
    assert modules.ours_of(norm).state_dict().keys() == norm.state_dict().keys()
    for x in (torch.randn(5, 4, 8), torch.randn(4, 5, 8).transpose(0, 1), torch.randn(0, 4, 8)):
        for grads in (True, False):
            modules.compare(norm, [x.to(dtype)], grads=grads)


def test_norm_of_one_vector():
    norm = ft.nn.LayerNorm(8)
    x = torch.randn(8)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_against_torch(dim, dtype):
    modules.compare(nn.Softmax(dim), [torch.randn(3, 5, 7).to(dtype)])


def test_softmax_without_dim_is_torchs():
    softmax, ours = nn.Softmax(), ft.nn.Softmax()
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension"):
        assert torch.equal(ours(x), softmax(x))
    assert ft.nn.fallbacks(ours) == {"": {"dim is None": 1}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_against_torch(bias, dtype):
    linear = randomized(nn.Linear(12, 7, bias=bias), dtype)
    for shape in ((12,), (3, 12), (2, 3, 12), (2, 0, 12), (2, 3, 5, 12)):
        modules.compare(linear, [torch.randn(shape).to(dtype)])


def test_linear_does_not_join_heads():
    linear = ft.nn.Linear(12, 7)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(torch.randn(2, 3, 5, 4))


# ---- residual and norm ----


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_add_norms(rms, dtype, affine):
    kind = ft.nn.AddRMSNorm if rms else ft.nn.AddLayerNorm
    norm = randomized(kind(8, elementwise_affine=affine), dtype)
    x, residual = torch.randn(2, 2, 5, 8).to(dtype).unbind()
    normed, summed = norm(x, residual)
    assert torch.equal(summed, x + residual)
    plain = (nn.RMSNorm if rms else nn.LayerNorm)(8, elementwise_affine=affine).to(dtype)
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(normed, plain(summed))


@pytest.mark.parametrize("rms", [False, True])
def test_add_norms_drop_in_training_only(rms):
    norm = (ft.nn.AddRMSNorm if rms else ft.nn.AddLayerNorm)(64, dropout=0.5)
    x, residual = torch.ones(64, 64), torch.zeros(64, 64)
    _, summed = norm(x, residual)
    assert set(summed.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (summed == 0).float().mean() < 0.6
    norm.eval()
    assert torch.equal(norm(x, residual)[1], x)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        type(norm)(8, dropout=1.0)


class PlainProjection(nn.Module):
    """OutputProjection, step by step, on the same parameters."""

    def __init__(self, ours):
        super().__init__()
        self.weight, self.bias = copy.deepcopy(ours.weight), copy.deepcopy(ours.bias)
        self.norm = copy.deepcopy(ours.norm)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.__class__ = nn.LayerNorm
        elif self.norm is not None:
            self.norm.__class__ = nn.RMSNorm

    def forward(self, x, residual):
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)
        summed = F.linear(x, self.weight, self.bias) + residual
        return summed if self.norm is None else (self.norm(summed), summed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_projection(norm, bias, dtype):
    ours = randomized(ft.nn.OutputProjection(12, 6, bias, norm=norm), dtype)
    plain = PlainProjection(ours)
    rows = torch.randn(2, 5, 12).to(dtype)
    heads = torch.randn(2, 5, 3, 4).to(dtype).transpose(1, 2)  # as attention leaves them
    strided = torch.randn(2, 3, 5, 4).to(dtype)
    one_head = torch.randn(2, 1, 5, 12).to(dtype)
    residual = torch.randn(2, 5, 6).to(dtype)
    for x in (rows, heads, strided, one_head):
        modules.compare(plain, [x, residual], ours=ours)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_output_projection_dropout_and_autocast(norm):
    ours = ft.nn.OutputProjection(12, 64, norm=norm, dropout=0.5)
    nn.init.zeros_(ours.weight)
    nn.init.ones_(ours.bias)
    heads, residual = torch.randn(2, 1, 32, 12), torch.zeros(2, 32, 64)
    out = ours(heads, residual)
    summed = out if norm is None else out[1]
    assert set(summed.unique().tolist()) == {0.0, 2.0}
    ours.eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(heads, residual)
        summed = out if norm is None else out[1]
        assert summed.dtype == torch.float32
    assert torch.equal(summed, torch.ones(2, 32, 64))


def test_output_projection_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="norm is 'batch'"):
        ft.nn.OutputProjection(4, 4, norm="batch")


# ---- feed-forward ----


class PlainFeedForward(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.activation = ours.activation
        self.linear1, self.linear2 = copy.deepcopy(ours.linear1), copy.deepcopy(ours.linear2)
        self.linear1.__class__ = self.linear2.__class__ = nn.Linear

    def forward(self, x):
        weights = (self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
        return reference.feed_forward(x, *weights, activation=self.activation)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_feed_forward(activation, bias, dtype):
    ours = ft.nn.FeedForward(8, 20, activation, bias=bias).to(dtype)
    x = torch.randn(3, 5, 8).to(dtype)
    if dtype == torch.bfloat16:  # the reference keeps the hidden values unrounded
        plain = PlainFeedForward(ours)
        torch.testing.assert_close(ours(x), plain(x), atol=1e-2, rtol=2e-2)
        return
    modules.compare(PlainFeedForward(ours), [x], ours=ours)


def test_feed_forward_dropout_and_bad_activation():
    block = ft.nn.FeedForward(8, 512, "relu", dropout=0.5)
    nn.init.zeros_(block.linear1.weight)
    nn.init.ones_(block.linear1.bias)
    nn.init.ones_(block.linear2.weight)
    nn.init.zeros_(block.linear2.bias)
    x = torch.randn(4, 8)
    assert 400 < block(x).mean() < 620
    assert torch.equal(block.eval()(x), torch.full((4, 8), 512.0))
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        ft.nn.FeedForward(8, 8, "tanh")


# ---- being a module ----


@pytest.mark.parametrize(
    "module, inputs",
    [
        (ft.nn.LayerNorm(8), 1),
        (ft.nn.RMSNorm(8), 1),
        (ft.nn.Linear(8, 8), 1),
        (ft.nn.Softmax(-1), 1),
        (ft.nn.AddLayerNorm(8), 2),
        (ft.nn.AddRMSNorm(8), 2),
        (ft.nn.OutputProjection(8, 8, norm="layer"), 2),
        (ft.nn.OutputProjection(8, 8), 2),
        (ft.nn.FeedForward(8, 16, "swiglu"), 1),
    ],
    ids=lambda v: type(v).__name__,
)
def test_copies_and_compile(module, inputs):
    xs = [torch.randn(3, 8, requires_grad=True) for _ in range(inputs)]
    want = module(*xs)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(*xs), want)
    repr(module)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(*xs)
    torch.testing.assert_close(got, want)
    grads = [
        torch.autograd.grad((o if isinstance(o, torch.Tensor) else o[0]).square().sum(), xs)
        for o in (got, want)
    ]
    torch.testing.assert_close(*grads)
