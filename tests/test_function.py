"""The two ways around autograd.Function's Python part, on one made-up operation: past it where this
torch is known, through it elsewhere. Numbers, hooks, refusals and transforms are the same."""

from __future__ import annotations

import pytest
import torch

from fasttransformer.ops import _function


class _Scaled:
    """x · y, and a second output that only the backward reads."""

    @staticmethod
    def forward(x, y, factor):
        return x * y * factor, y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.factor = inputs
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y * ctx.factor, grad * x * ctx.factor, None


@pytest.fixture(params=["past", "public"])
def scaled(request, monkeypatch):
    if request.param == "public":
        monkeypatch.setattr(_function, "_unwrap_if_dead", None)
    elif _function._unwrap_if_dead is None:
        pytest.skip("this torch's Function.apply is always called")
    return _function.differentiable(_Scaled, tensors=2, outputs=1)


def test_an_unknown_torch_takes_the_public_path(monkeypatch):
    for version in ("2.11.0", "2.14.0+cpu", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert _function._unwrapping() is None


def test_gradients_and_hooks(scaled):
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    seen = []
    x.register_hook(seen.append)
    out = scaled(x, y, 2.0)
    out.register_hook(lambda g: 3 * g)
    out.grad_fn.register_hook(lambda to, of: seen.append(of[0]))
    out.sum().backward()
    torch.testing.assert_close(x.grad, 6 * y)
    torch.testing.assert_close(y.grad, 6 * x)
    assert len(seen) == 2


def test_second_derivatives_are_refused(scaled):
    x = torch.randn(3, requires_grad=True)
    # Of a sum the gradient that comes in is constant: torch's once_differentiable passes it on, and
    # the second derivative is 0 in silence.
    for loss in (lambda x: scaled(x, x, 1.0).square().sum(), lambda x: scaled(x, x, 1.0).sum()):
        torch.autograd.grad(loss(x), x)
        with pytest.raises(NotImplementedError, match="a derivative of a gradient is wanted"):
            torch.autograd.grad(loss(x) + (x**3).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match='call the operation with backend="torch"'):
            torch.func.grad(
                lambda x, f=loss: torch.autograd.grad(f(x), x, create_graph=True)[0].sum()
            )(x.detach())


def test_transforms_and_tensors_that_outlive_them(scaled):
    x, y = torch.randn(4, 3), torch.randn(3)
    kept = []

    def loss(x):
        kept.append(x)
        return scaled(x, y, 2.0).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x[0]), 2 * y)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), (2 * y).expand(4, 3))
    leaf = y.clone().requires_grad_()
    out = scaled(kept[0], leaf, 2.0)  # a wrapper that is dead by now
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], 2 * x[0])


def test_compiles(scaled):
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    compiled = torch.compile(
        lambda x, y: scaled(x, y, 2.0) + 1, fullgraph=True, backend="aot_eager"
    )
    out = compiled(x, y)
    torch.testing.assert_close(out, 2 * x * y + 1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 2 * y)


def test_subclasses_stay(scaled):
    class Sub(torch.Tensor):
        pass

    x = torch.randn(3).as_subclass(Sub).requires_grad_()
    y = torch.randn(3, requires_grad=True)
    assert type(scaled(x, y, 1.0)) is Sub
