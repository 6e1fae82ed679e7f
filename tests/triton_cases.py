"""The calls whose kernels test_triton.py compiles: one per kernel and interesting tile size."""

import torch
from fasttransformer.kernels import _norm
from fasttransformer.kernels import softmax as soft

BF16, F32 = torch.bfloat16, torch.float32


def _softmax(columns, dtype, mask=False, is_causal=False, log=False):
    x = torch.empty(1, 2, columns, dtype=dtype)
    allowed = torch.ones(1, 1, columns, dtype=torch.bool).expand(x.shape) if mask else None
    soft.softmax(x, 0.5, allowed, is_causal, log)
    soft.softmax_backward(x, x, 0.5, log)


def _layer_norm(columns, dtype, dropout_p=0.0, rms=False, rows=64, add=True):
    x = torch.empty(rows, columns, dtype=dtype)
    r = torch.empty_like(x) if add else None
    w = torch.empty(columns, dtype=dtype)
    row = torch.empty(rows)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    _norm.forward(x, r, w, None if rms else w, 1e-5, dropout_p, seed, rms)
    mean = None if rms else row
    _norm.backward(x, r, x, w, mean, row, dropout_p, seed, True, not rms)


CASES = {
    "softmax 64 bf16": lambda: _softmax(64, BF16),
    "softmax 1000 f32": lambda: _softmax(1000, F32, mask=True, log=True),
    "softmax 4096 bf16": lambda: _softmax(4096, BF16, is_causal=True),
    "softmax 16384 bf16": lambda: _softmax(16384, BF16),
    "softmax 16384 f32": lambda: _softmax(16384, F32, mask=True),
    "softmax 65536 bf16": lambda: _softmax(65536, BF16, mask=True),
    "norm 64 bf16": lambda: _layer_norm(64, BF16, add=False),
    "norm 384 f32": lambda: _layer_norm(384, F32, rms=True),
    "norm 768 bf16": lambda: _layer_norm(768, BF16, 0.1),
    "norm 4096 bf16": lambda: _layer_norm(4096, BF16),
    "norm 8192 f32": lambda: _layer_norm(8192, F32),
    "norm 16384 bf16": lambda: _layer_norm(16384, BF16),
    "norm 65536 bf16": lambda: _layer_norm(65536, BF16, rms=True),
}
