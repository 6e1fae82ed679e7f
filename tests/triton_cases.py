"""Calls whose kernels are compiled offline: CASES by hand, FEW of them by test_triton.py."""

import torch

from fasttransformer.kernels import (
    _norm,
    activation,
    attention,
    attention_decode,
    attention_varlen,
    cross_entropy,
    embedding,
    linear_add,
    linear_cross_entropy,
    linear_softmax,
    linear_topk,
)
from fasttransformer.kernels import rotary_embedding as rotary
from fasttransformer.kernels import softmax as soft
from fasttransformer.ops._activation import CODES
from fasttransformer.reference.feed_forward import GATES

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


def _attention(D, dtype, E=None, S=256, T=256, G=2, H=4, mask=False, bias=None, everything=False,
               is_causal=False):  # fmt: skip
    def heads(h, n, d):
        return torch.empty(2, n, h, d, dtype=dtype).transpose(1, 2)

    E = E or D
    q, k, v, out = heads(H, S, D), heads(G, T, D), heads(G, T, E), heads(H, S, E)
    lse = torch.empty(2, H, S)
    m = torch.ones(2, 1, 1, T, dtype=torch.bool).expand(2, H, S, T) if mask else None
    b = None if bias is None else torch.empty(bias, dtype=dtype).expand(2, H, S, T)
    slopes, sinks, lengths, seed, window, softcap, dropout_p = None, None, None, None, -1, 0.0, 0.0
    if everything:
        slopes, sinks, lengths = torch.ones(2, H), torch.ones(H), torch.ones(2, dtype=torch.int32)
        seed, window, softcap, dropout_p = torch.zeros(1, dtype=torch.int64), 100, 30.0, 0.1
    options = (m, b, is_causal, False, window, window, softcap, slopes, sinks, lengths, 0.1,
               dropout_p, seed)  # fmt: skip
    attention.attention(q, k, v, *options)
    if S > 1:
        attention.attention_backward(
            out, lse if everything else None, q, k, v, out, lse, *options, b is not None, False
        )


def _attention_varlen(D, dtype, everything=False):
    q, out = torch.empty(2, 256, 4, D, dtype=dtype)
    k, v = torch.empty(2, 300, 2, D, dtype=dtype)
    lse, cu = torch.empty(4, 256), torch.tensor([0, 200, 256], dtype=torch.int32)
    mask = bias = slopes = sinks = seed = None
    if everything:
        mask = torch.ones(1, 1, 1, 200, dtype=torch.bool).expand(2, 4, 200, 200)
        bias = torch.empty(1, 4, 1, 200, dtype=dtype).expand(2, 4, 200, 200)
        slopes, sinks, seed = torch.ones(2, 4), torch.ones(4), torch.zeros(1, dtype=torch.int64)
    options = (cu, cu, 200, 200, mask, bias, True, True, -1, -1, 30.0 if everything else 0.0,
               slopes, sinks, 0.1, 0.1 if everything else 0.0, seed)  # fmt: skip
    attention_varlen.attention_varlen(q, k, v, *options)
    attention_varlen.attention_varlen_backward(
        out, None, q, k, v, out, lse, *options, everything, False
    )


def _attention_decode(D, dtype):
    q, cache = torch.empty(2, 8, 1, D, dtype=dtype), torch.empty(2, 2, 512, D, dtype=dtype)
    lengths = torch.ones(2, dtype=torch.int32)
    options = (None, None, True, 100, -1, 0.0, None, None, 0.1)
    attention_decode.attention_decode(q, cache, cache, lengths, *options)


def _linear(M, N, K, dtype, heads=0, backward=False, norm=False, activation="", dropout_p=0.0):
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    x = torch.empty(M, K, dtype=dtype)
    if heads:
        x = torch.empty(2, M // 2, heads, K // heads, dtype=dtype).transpose(1, 2)
    w, b, r = (torch.empty(*size, dtype=dtype) for size in ((N, K), (N,), (M, N)))
    if backward:
        linear_add.linear_add_backward(r, x, w, True, True, True)
    elif norm:
        linear_add.linear_add_norm(x, w, b, r, b, b, 1e-5, True, dropout_p, seed, rms=False)
    else:
        linear_add.linear_add(x, w, b, r, CODES[activation], dropout_p, seed)


def _output_layer(rows, features, classes, dtype, weighted=False):
    x, w, b = (
        torch.empty(*s, dtype=dtype) for s in ((rows, features), (classes, features), (classes,))
    )
    target = torch.zeros(rows, dtype=torch.int64)
    weight = torch.ones(classes) if weighted else None
    loss = (x, w, b, target, weight, -100, 0.1 if weighted else 0.0)
    _, statistics, *_ = linear_cross_entropy.linear_cross_entropy(*loss, True, True, True, True)
    linear_cross_entropy.linear_cross_entropy_backward(
        statistics[:, 0], *loss[:5], statistics, *loss[5:], True, True, True
    )
    linear_softmax.linear_softmax(x, w, b, 0.7)
    for k in (50, 100):
        linear_topk.linear_topk(x, w, b, k, 0.7)


def _cross_entropy(columns, dtype, smoothing=0.0, rows=64):
    x, target = torch.empty(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    weight = torch.empty(columns) if smoothing else None
    cross_entropy.cross_entropy(x, target, weight, -100, smoothing)
    statistics, grad = torch.empty(rows, 4), torch.empty(rows)
    cross_entropy.cross_entropy_backward(grad, x, target, weight, statistics, -100, smoothing)


def _embedding(features, dtype, everything=False):
    ids, weight = torch.zeros(8, 64, dtype=torch.int64), torch.empty(100, features, dtype=dtype)
    table = torch.empty(64, features, dtype=dtype) if everything else None
    positions = torch.zeros(64, dtype=torch.int32) if everything else None
    embedding.embedding(ids, weight, positions, table, everything, 2.0)
    order = ids.view(-1)
    embedding.embedding_backward(weight.new_empty((512, features)), order, order, 100, 2.0, 1)


def _rotary(head_dim, dtype, interleaved=False):
    query, key = (torch.empty(2, 64, h, head_dim, dtype=dtype).transpose(1, 2) for h in (8, 2))
    table, ids = torch.empty(64, head_dim // 2), torch.zeros(2, 64, dtype=torch.int64)
    rotary.rotary_embedding(query, key, table, table, interleaved, ids if interleaved else None)


def _activation(features, dtype, name):
    x = torch.empty(64, features * (2 if name in GATES else 1), dtype=dtype)
    code = CODES[name]
    activation.activation_backward(activation.activation(x, code), x, code)


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
    "attention 64 bf16": lambda: _attention(64, BF16),
    "attention 64 bf16 bias": lambda: _attention(64, BF16, bias=(1, 4, 256, 256)),
    "attention 64 f16 causal": lambda: _attention(64, torch.float16, is_causal=True),
    "attention 128 bf16 causal": lambda: _attention(128, BF16, is_causal=True),
    "attention 128 bf16 mask": lambda: _attention(128, BF16, mask=True),
    "attention 128 bf16 bias": lambda: _attention(128, BF16, bias=(1, 4, 256, 256)),
    "attention 128 bf16 decode": lambda: _attention(128, BF16, S=1),
    "attention_decode 128 bf16": lambda: _attention_decode(128, BF16),
    "attention_varlen 128 bf16": lambda: _attention_varlen(128, BF16),
    "attention_varlen 64 f16": lambda: _attention_varlen(64, torch.float16),
    "attention_varlen 64 f32 everything": lambda: _attention_varlen(64, F32, True),
    "attention 96-80 bf16": lambda: _attention(96, BF16, E=80),
    "attention 256 bf16 causal": lambda: _attention(256, BF16, is_causal=True),
    "attention 64 bf16 everything": lambda: _attention(
        64, BF16, mask=True, bias=(1, 4, 1, 256), everything=True
    ),
    "attention 64 f32": lambda: _attention(64, F32, bias=(2, 4, 256, 256)),
    "attention 128 f32 causal": lambda: _attention(128, F32, is_causal=True),
    "attention 256 f32": lambda: _attention(256, F32),
    "cross_entropy 1000 f32": lambda: _cross_entropy(1000, F32, 0.1),
    "cross_entropy 50257 bf16": lambda: _cross_entropy(50257, BF16),
    "cross_entropy 128256 f32": lambda: _cross_entropy(128256, F32, 0.1),
    "embedding 384 f32": lambda: _embedding(384, F32),
    "embedding 4096 bf16": lambda: _embedding(4096, BF16, everything=True),
    "rotary 128 bf16": lambda: _rotary(128, BF16),
    "rotary 64 f32": lambda: _rotary(64, F32, interleaved=True),
    "activation 3072 bf16": lambda: _activation(3072, BF16, "gelu"),
    "activation 11008 bf16": lambda: _activation(11008, BF16, "swiglu"),
    "activation 100 f32": lambda: _activation(100, F32, "gelu_tanh"),
    "linear 4096x4096x4096 bf16": lambda: _linear(4096, 4096, 4096, BF16, activation="gelu"),
    "linear 2048x768x768 bf16": lambda: _linear(2048, 768, 768, BF16, heads=12),
    "linear 4x4096x4096 bf16": lambda: _linear(4, 4096, 4096, BF16),
    "linear 100x99x50 f16": lambda: _linear(100, 99, 50, torch.float16, activation="gelu_tanh"),
    "linear 512x384x384 f32": lambda: _linear(512, 384, 384, F32, activation="silu"),
    "linear 2048x512x512 bf16 dropout": lambda: _linear(2048, 512, 512, BF16, dropout_p=0.1),
    "linear 512x384x384 f32 dropout": lambda: _linear(512, 384, 384, F32, dropout_p=0.1),
    "linear backward 2048x768x768 bf16": lambda: _linear(2048, 768, 768, BF16, 12, backward=True),
    "linear norm 32768x384x384 bf16": lambda: _linear(32768, 384, 384, BF16, norm=True),
    "linear norm 32768x256x256 bf16": lambda: _linear(32768, 256, 256, BF16, norm=True),
    "linear norm 32768x256x256 bf16 dropout": lambda: _linear(
        32768, 256, 256, BF16, norm=True, dropout_p=0.1
    ),
    "output layer 2048x1024x32000 bf16": lambda: _output_layer(2048, 1024, 32000, BF16),
    "output layer 64x512x8192 f32 weighted": lambda: _output_layer(64, 512, 8192, F32, True),
}

#: Every kernel once, and the tiles with most registers; seconds, where CASES takes minutes.
FEW = {
    "softmax 1000 f32",
    "softmax 16384 f32",
    "softmax 65536 bf16",
    "norm 768 bf16",
    "norm 8192 f32",
    "norm 65536 bf16",
    "attention 64 bf16 bias",
    "attention 128 bf16 causal",
    "attention_varlen 128 bf16",
    "cross_entropy 50257 bf16",
    "cross_entropy 128256 f32",
    "embedding 4096 bf16",
    "rotary 64 f32",
    "activation 11008 bf16",
    "linear 2048x768x768 bf16",
    "linear backward 2048x768x768 bf16",
    "linear norm 32768x384x384 bf16",
    "linear norm 32768x256x256 bf16 dropout",
    "output layer 64x512x8192 f32 weighted",
}
assert FEW <= CASES.keys()
