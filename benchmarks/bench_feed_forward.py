"""feed_forward: forward, and a training step's forward and backward, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttransformer as ft
from fasttransformer import reference

from ._shared import OURS, Case, candidates, randn, run_under_pytest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((256, 384, 1536),)
FULL = ((16, 384, 1536), (2048, 384, 1536), (2048, 768, 3072))
#: Matrices of weights, the gate's counted, and torch's own way.
KINDS = {
    "gelu": (2, lambda x: F.gelu(x)),
    "swiglu": (3, lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]),
}


def cases(quick: bool = False) -> list[Case]:
    found = []
    for rows, features, hidden in QUICK if quick else FULL:
        for dtype in DTYPES:
            for name, (matrices, act) in KINDS.items():
                width = hidden * (matrices - 1)

                def tensors(shape=(rows, features, hidden, width), dtype=dtype, grad=False):
                    rows, features, hidden, width = shape
                    sizes = ((rows, features), (width, features), (width,),
                             (features, hidden), (features,))  # fmt: skip
                    return [randn(*s, dtype=dtype).mul_(0.05).requires_grad_(grad) for s in sizes]

                def ours(*args: Tensor, name=name):
                    return ft.feed_forward(*args, activation=name)

                def theirs(x, w_in, b_in, w_out, b_out, act=act):
                    return F.linear(act(F.linear(x, w_in, b_in)), w_out, b_out)

                def wanted(*args: Tensor, name=name):
                    return reference.feed_forward(*args, activation=name)

                def forward(tensors=tensors, ours=ours, theirs=theirs, wanted=wanted):
                    return candidates({OURS: ours, "torch": theirs}, tensors(), "forward", wanted)

                def step(tensors=tensors, ours=ours, theirs=theirs, wanted=wanted):
                    args = tensors(grad=True)
                    mode = "forward + backward"
                    return candidates({OURS: ours, "torch": theirs}, args, mode, wanted)

                flops = 2 * rows * features * hidden * matrices
                shape = f"{rows}×{features}×{hidden} {name}"
                size = (features * hidden * matrices + 2 * rows * features) * dtype.itemsize
                found += [
                    Case("feed_forward", shape, dtype, forward, bytes=size, flops=flops),
                    Case("feed_forward", f"{shape} training", dtype, step,
                         bytes=3 * size, flops=3 * flops),
                ]  # fmt: skip
    return found


test_feed_forward = run_under_pytest
