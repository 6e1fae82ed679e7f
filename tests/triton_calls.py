"""What the tests of the Triton kernels share: where they run, and how results are compared."""

import pytest
import torch
from torch import Tensor

from fasttransformer._contract import compare_runs
from fasttransformer.backends import backends

if backends()["triton"] is not None:
    pytest.skip(f"Triton: {backends()['triton']}", allow_module_level=True)

T = torch.ops.fasttransformer_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def rand(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def compared(outs, grads, function, inputs, cotangents):
    """Outputs and gradients against `function`, the reference, in float64 and the inputs' dtype."""

    def run(dtype):
        args = [
            x if x is None else x.detach().cpu().to(dtype or x.dtype).requires_grad_()
            for x in inputs
        ]
        results = function(*args)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [x for x, g in zip(args, grads) if g is not None]
        if not wanted:
            return results, ()
        loss = sum((r * c.cpu().to(r.dtype)).sum() for r, c in zip(results, cotangents))
        return results, torch.autograd.grad(loss, wanted)

    given = [g for g in grads if g is not None]
    return compare_runs((outs, given), run(torch.float64), run(None))


def hold(*arguments):
    for name, found in compared(*arguments).items():
        assert found.problem is None, f"{name}: {found.problem}"
