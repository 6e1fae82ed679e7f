"""Evaluation mode for a while, and then every part's own mode again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` in evaluation mode; at the end each module is in the mode that it was in.

    ``model.train()`` would not do: it turns dropout on in the parts that the user had frozen with
    ``eval()``. A module with a ``train`` of its own, which may do more than set a flag (adapters
    merge their weights), gets its mode by that method.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    >>> _ = model[0].eval()
    >>> with evaluating(model):
    ...     inside = [module.training for module in model.modules()]
    >>> inside, [module.training for module in model.modules()]
    ([False, False, False], [True, False, True])
    """
    before = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in before):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        # Outer modules come first: what their own method does to inner ones is put right after it.
        for module, training in before:
            if type(module).train is not nn.Module.train and module.training != training:
                module.train(training)
        for module, training in before:
            if module.training != training:
                module.training = training
