"""The calls whose kernels test_triton.py compiles: one per kernel and interesting tile size."""

import torch
from fasttransformer.kernels import softmax as soft

BF16, F32 = torch.bfloat16, torch.float32


def _softmax(columns, dtype, mask=False, is_causal=False, log=False):
    x = torch.empty(1, 2, columns, dtype=dtype)
    allowed = torch.ones(1, 1, columns, dtype=torch.bool).expand(x.shape) if mask else None
    soft.softmax(x, 0.5, allowed, is_causal, log)
    soft.softmax_backward(x, x, 0.5, log)


CASES = {
    "softmax 64 bf16": lambda: _softmax(64, BF16),
    "softmax 1000 f32": lambda: _softmax(1000, F32, mask=True, log=True),
    "softmax 4096 bf16": lambda: _softmax(4096, BF16, is_causal=True),
    "softmax 16384 bf16": lambda: _softmax(16384, BF16),
    "softmax 16384 f32": lambda: _softmax(16384, F32, mask=True),
    "softmax 65536 bf16": lambda: _softmax(65536, BF16, mask=True),
}
