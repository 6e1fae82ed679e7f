"""Whether the candidates of a case compute the same: a peer that is wrong is shown as wrong.

Each is run once and held to the case's reference (float64), or where a case has none to ours, which
the tests hold to the reference. The tolerance is loose, as it must find another computation and
not judge rounding: that is what the tests do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fasttransformer.benchmarks._shared import OURS, REFERENCE, Candidate, Case, percent

#: Largest difference, as a fraction of the largest number of the wanted tensor.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def tensors_of(result: object) -> list[Tensor]:
    """The tensors of a result, in order; of a model's output those of its fields."""
    return list(_tensors(result))


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result.detach()
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def difference(got: object, want: object, dtype: torch.dtype) -> str | None:
    """How the results differ, or None if they agree.

    Only as many tensors are compared as both have; shapes may differ by joined dimensions.

    >>> difference(torch.ones(2), torch.ones(2), torch.float32)
    >>> difference(torch.ones(2), torch.tensor([1.0, 2.0]), torch.float32)
    'differs by 50 % of the largest number'
    """
    tolerance = TOLERANCE.get(dtype, 1e-6)
    for a, b in zip(tensors_of(got), tensors_of(want)):
        if a.numel() != b.numel():
            return f"has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if not a.numel():
            continue
        a, b = a.reshape(-1).to(b.device), b.reshape(-1)
        if not b.is_floating_point():
            if not torch.equal(a.to(b.dtype), b):
                return "has other integers"
            continue
        a, b = a.double(), b.double()
        special = ~b.isfinite()
        if not torch.equal(a[special].nan_to_num(), b[special].nan_to_num()):
            return "has other infinities or NaNs"
        scale = b[~special].abs().max().item() if (~special).any() else 0.0
        error = (a - b)[~special].abs().max().item() if (~special).any() else 0.0
        if not error <= tolerance * scale:
            return f"differs by {percent(error / scale if scale else error)} of the largest number"
    return None


def disagreements(case: Case, candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Candidates that are wrong or fail, and how; ours among them only beside a reference."""
    wrong: dict[str, str] = {}
    results: dict[str, object] = {}
    names = [REFERENCE, OURS] if REFERENCE in candidates else [OURS]
    names += [name for name in candidates if name not in names]
    for name in names:
        try:
            result = candidates[name]()
        except Exception as error:  # a peer's own failure must not end the run
            if name in (OURS, REFERENCE):
                raise
            wrong[name] = f"fails: {type(error).__name__}: {str(error).strip()[:200]}"
            continue
        results.setdefault("want", result)
        if not case.compared:
            continue
        how = difference(result, results["want"], case.dtype)
        if how is not None:
            wrong[name] = how
    return wrong
