"""Transformer layers over every flag of constructor and call: what a case of the grid builds."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

L, S, B, E, H, FF = 5, 7, 3, 16, 4, 24
KINDS = [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.silu": F.silu,
    "GELU(tanh)": nn.GELU(approximate="tanh"),
    "partial": functools.partial(F.leaky_relu, negative_slope=0.2),
    "Mish": nn.Mish(),
    "PReLU": nn.PReLU(),
}
SMOOTH = ("gelu", "F.silu", "GELU(tanh)", "Mish")
GRID = {
    "activation": tuple(ACTIVATIONS),
    "batch_first": (True, False),
    "norm_first": (False, True),
    "bias": (True, False),
    "batched": (True, False),
    "mask": ("none", "bool", "float", "bool_3d", "float_3d", "causal"),
    "padding": ("none", "bool", "float"),
    "memory_mask": ("none", "bool", "float", "float_3d"),
    "memory_padding": ("none", "bool", "float"),
    "training": (False, True),
    "grads": (True, False),
}


def build(case: dict, kind: type, dtype=torch.float32) -> nn.Module:
    layer = kind(
        E, H, FF, dropout=0.0 if case["training"] else 0.5, bias=case["bias"],
        activation=copy.deepcopy(ACTIVATIONS[case["activation"]]), layer_norm_eps=1e-3,
        batch_first=case["batch_first"], norm_first=case["norm_first"],
    )  # fmt: skip
    for p in layer.parameters():  # biases and norms start at 0 and 1
        nn.init.normal_(p, std=0.4)
    return layer.to(dtype)


def keep_from_kink(layer: nn.Module) -> None:
    """Puts what the activation reads far to either side of 0, where some have a kink.

    Near it a rounding step flips the derivative, in torch's 16-bit run too. A layer without bias
    gets an activation that has none.
    """
    if layer.linear1.bias is None:
        layer.activation = nn.GELU(approximate="tanh")
        return
    with torch.no_grad():
        layer.linear1.weight.mul_(0.05)
        layer.linear1.bias.copy_(torch.tensor([1.5, -1.5]).repeat(FF // 2))


def sequence(case: dict, length: int, dtype) -> torch.Tensor:
    shape = (B, length, E) if case["batch_first"] else (length, B, E)
    return torch.randn((length, E) if not case["batched"] else shape).to(dtype)


def mask_of(kind: str, case: dict, q_len: int, k_len: int, dtype) -> torch.Tensor | None:
    batch = B if case["batched"] else 1
    shape = (batch * H, q_len, k_len) if kind.endswith("3d") else (q_len, k_len)
    if kind.startswith("bool"):
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False
        return mask
    if kind.startswith("float"):
        return torch.randn(shape).to(dtype)
    if kind == "causal":
        return nn.Transformer.generate_square_subsequent_mask(q_len, dtype=dtype)
    return None


def padding_of(kind: str, case: dict, length: int, dtype) -> torch.Tensor | None:
    if kind == "none":
        return None
    padding = torch.rand(B if case["batched"] else 1, length) < 0.3
    padding[:, 0] = False
    if kind == "float":
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf")).to(dtype)
    return padding if case["batched"] else padding[0]
