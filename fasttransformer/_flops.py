"""How many floating-point operations our operators count for in torch's ``FlopCounterMode``.

It counts a product of matrices as 2 m n k and attention as its two products, without what a causal
mask leaves out, forward; backward, the scores are computed once more. So the same here: a swapped
model counts what the original does.

>>> import torch, fasttransformer as ft
>>> from torch.utils.flop_counter import FlopCounterMode
>>> with FlopCounterMode(display=False) as counted:
...     _ = ft.nn.Linear(3, 5)(torch.ones(2, 3))
>>> counted.get_total_flops()
60
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .backends import operator_namespaces


def _formula(*ops: str, values: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula for ``ops`` on every backend: it gets each tensor's shape, or with
    ``values`` the tensors."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        packets = [
            getattr(getattr(torch.ops, namespace), op)
            for namespace in operator_namespaces()
            for op in ops
            if hasattr(getattr(torch.ops, namespace), op)
        ]
        register_flop_formula(packets, get_raw=values)(formula)
        return formula

    return register


def _product(input: torch.Size, weight: torch.Size) -> int:
    """``input @ weight.T``, the input's last dimension or its heads being what is summed over."""
    return 2 * math.prod(input) * weight[0]


@_formula(
    "linear_add", "linear_add_layer_norm", "linear_add_rms_norm", "linear_softmax", "linear_topk"
)
def _(input, weight, *args, out_shape=None, **kwargs) -> int:
    return _product(input, weight)


@_formula("linear_add_backward")
def _(grad, input, weight, input_grad, weight_grad, bias_grad, out_shape=None) -> int:
    return (input_grad + weight_grad) * _product(input, weight)


@_formula("linear_cross_entropy")
def _(
    input, weight, bias, target, class_weight, ignore_index, label_smoothing, mean, input_grad,
    weight_grad, bias_grad, out_shape=None,
) -> int:  # fmt: skip
    return (1 + input_grad + weight_grad) * _product(input, weight)


@_formula("linear_cross_entropy_backward")
def _(
    grad, input, weight, bias, target, class_weight, statistics, ignore_index, label_smoothing,
    input_grad, weight_grad, bias_grad, out_shape=None,
) -> int:  # fmt: skip
    return (1 + input_grad + weight_grad) * _product(input, weight)


def _attention(
    heads: int, pairs: int, key_dim: int, value_dim: int, *, backward: bool = False
) -> int:
    """``pairs`` of a query and a key, summed over the batch; backward takes three products over the
    key's features and two over the value's."""
    products = 3 * key_dim + 2 * value_dim if backward else key_dim + value_dim
    return 2 * heads * pairs * products


@_formula("attention")
def _(query, key, value, *args, out_shape=None, **kwargs) -> int:
    pairs = query[0] * query[2] * key[2]
    return _attention(query[1], pairs, key[3], value[3])


@_formula("attention_backward")
def _(grad_out, grad_lse, query, key, value, *args, out_shape=None, **kwargs) -> int:
    pairs = query[0] * query[2] * key[2]
    return _attention(query[1], pairs, key[3], value[3], backward=True)


def _numbers(lengths: Tensor, at_most: int) -> list[int]:
    """The lengths as numbers; as many as there could be where they are not known."""
    if isinstance(lengths, FakeTensor) or lengths.device.type == "meta":
        return [at_most] * lengths.numel()
    return lengths.tolist()


def _packed_pairs(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> int:
    queries = _numbers(cu_seqlens_q.diff(), max_seqlen_q)
    keys = _numbers(cu_seqlens_k.diff(), max_seqlen_k)
    return sum(q * k for q, k in zip(queries, keys))


@_formula("attention_varlen", values=True)
def _(query, key, value, cu_q, cu_k, max_q, max_k, *args, out_val=None, **kwargs) -> int:
    pairs = _packed_pairs(cu_q, cu_k, max_q, max_k)
    return _attention(query.shape[1], pairs, key.shape[2], value.shape[2])


@_formula("attention_varlen_backward", values=True)
def _(
    grad_out: Tensor, grad_lse: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *args: Any, out_val: Any = None,
    **kwargs: Any,
) -> int:  # fmt: skip
    pairs = _packed_pairs(cu_q, cu_k, max_q, max_k)
    return _attention(query.shape[1], pairs, key.shape[2], value.shape[2], backward=True)


@_formula("attention_decode", values=True)
def _(query, key, value, key_lengths, *args, out_val=None, **kwargs) -> int:
    pairs = query.shape[2] * sum(_numbers(key_lengths, key.shape[2]))
    return _attention(query.shape[1], pairs, key.shape[3], value.shape[3])
