"""What the tests of the fronts share: one call that is right, and changes that each must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fasttransformer as ft


def refuses(
    op: str, arguments: dict[str, Any], change: dict[str, Any], error: type, text: str
) -> None:
    """The changed call raises, naming the operation and what is wrong; so does explaining it."""
    function: Callable[..., Any] = getattr(ft, op)
    for call in (
        lambda: function(**arguments | change),
        lambda: ft.explain(op, **arguments | change),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(f"{op}: "), caught.value
        assert text in str(caught.value)


def runs_on_the_reference(op: str, *args: Any, **kwargs: Any) -> None:
    """The torch backend runs the case; forcing another one raises with a reason."""
    assert ft.explain(op, *args, **kwargs).backend == "torch"
    with pytest.raises(RuntimeError, match=f"{op}: backend 'cpu' was asked for but can't do this"):
        getattr(ft, op)(*args, **kwargs, backend="cpu")
    with ft.use_backend("torch"):
        getattr(ft, op)(*args, **kwargs)


def same_compiled(function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Compiled without graph breaks, the function and its gradients are those of the eager one."""

    def outputs(f: Callable[..., Any]) -> tuple[list, list]:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = f(*leaves)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]
        wanted = [x for x in leaves if x.requires_grad]
        return outs, list(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted))

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(outputs(compiled), outputs(function))
