"""The table's rules about gradients: no row promises a backward that its backend does not have."""

import pytest
import torch

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.backends import COMPOSED, TABLE, _chosen

if ft.backends()["cpu"] is not None:
    pytest.skip("the C++ library is not built", allow_module_level=True)

JOINED = {
    "linear_add_layer_norm": ("add_layer_norm", "linear_add"),
    "linear_add_rms_norm": ("add_rms_norm", "linear_add"),
    "linear_softmax": ("softmax", "linear_add"),
}
#: A gradient goes to the reference, with a reason.
FORWARD_ONLY = {"linear_topk", "attention_decode"}


def inputs_of(op):
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(3, 5)]
    if op == "linear_softmax":
        return [t.requires_grad_() for t in tensors[:3]]
    tensors += [torch.randn(5) for _ in range(2 if op == "linear_add_layer_norm" else 1)]
    return [t.requires_grad_() for t in tensors]


@pytest.fixture
def without_backward():
    """Takes an operation's backward operator from the CPU row, as in an older library."""
    taken = []

    def take(op):
        kernel = TABLE[op]["cpu"]
        taken.append((kernel, kernel.backward))
        object.__setattr__(kernel, "backward", None)
        _chosen.clear()

    yield take
    _chosen.clear()
    for kernel, backward in taken:
        object.__setattr__(kernel, "backward", backward)


@pytest.mark.parametrize("op", [op for op in TABLE if op not in COMPOSED])
def test_every_kernel_has_a_backward_or_says_from_where(op):
    for name, kernel in TABLE[op].items():
        if name == "torch" or kernel.forward is None:
            continue
        assert kernel.backward_from == JOINED.get(op, ())
        assert (kernel.backward is None) == (op in JOINED or op in FORWARD_ONLY)
        reason = kernel.unsupported(torch.float32, frozenset({"grad"}), ())
        assert (reason is None) == (op not in FORWARD_ONLY)


@pytest.mark.parametrize(("op", "missing"), [(op, m) for op, ms in JOINED.items() for m in ms])
def test_a_gradient_joined_from_operators_that_are_not_there(without_backward, op, missing):
    without_backward(missing)
    inputs = inputs_of(op)
    function = getattr(ft, op)
    found = ft.explain(op, *inputs)
    assert found.backend == "torch"
    assert f"its backward needs that of {missing}, which is not there" in str(found)
    with pytest.raises(RuntimeError, match=f"its backward needs that of {missing}"):
        function(*inputs, backend="cpu")
    with torch.no_grad():
        assert ft.explain(op, *inputs).backend == "cpu"
    grads = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs)
    wants = torch.autograd.grad(getattr(reference, op)(*inputs)[0].square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, wants))


def test_a_kernel_whose_own_backward_is_not_there(without_backward):
    without_backward("softmax")
    x = torch.randn(3, 4, requires_grad=True)
    assert ft.explain("softmax", x.detach()).backend == "cpu"
    assert "does not implement its backward" in str(ft.explain("softmax", x))
    assert torch.autograd.grad(ft.softmax(x).square().sum(), x)[0].isfinite().all()
