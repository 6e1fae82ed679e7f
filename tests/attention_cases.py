"""What the tests of attention share: inputs as models give them, and the comparison."""

import contextlib

import pytest
import torch

import fasttransformer as ft
from contract import backends_of, check
from fasttransformer import reference

BACKENDS = backends_of("attention")
KERNELS = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
slow_interpreter = {"triton"} & {name for name in BACKENDS if not torch.cuda.is_available()}


def inputs(batch, heads, kv_heads, q_len, kv_len, dim, value_dim=None, dtype=torch.float32):
    """query, key and value as models give them: (batch, sequence, heads, dim), transposed."""
    shapes = [(batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim),
              (batch, kv_len, kv_heads, value_dim or dim)]  # fmt: skip
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


@contextlib.contextmanager
def skip_if_unsupported():
    try:
        yield
    except RuntimeError as error:
        if "was asked for but can't do this" not in str(error):
            raise
        pytest.skip(str(error))


def compare(on, tensors, grads=True, bias=None, sinks=None, **options):
    """out and lse, and the gradients of query, key, value, bias and sinks, against float64."""

    def call(function):
        def run(query, key, value, bias, sinks):
            return function(query, key, value, bias=bias, sinks=sinks, return_lse=True, **options)

        return run

    with skip_if_unsupported():
        check(
            call(ft.attention),
            call(reference.attention),
            [*tensors, bias, sinks],
            grads=grads,
            on=on,
            redraw=lambda: [*other_signs(tensors), bias, sinks],
        )


def other_signs(tensors):
    """New draws of the same kind: every number keeps its magnitude, so that extremes stay."""
    return [torch.where(torch.rand_like(t, dtype=torch.float32) < 0.5, t, -t) for t in tensors]
