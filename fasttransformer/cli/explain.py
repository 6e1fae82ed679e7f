"""``fasttransformer explain``: which backend runs a case, and why not the ones before it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft

from .._arguments import not_one_of
from ..backends import ALIASES, COMPOSED, NAMES, TABLE, Explanation
from ._output import UsageError, command, device_of, dtype_of, print_json, shape_of


class _Arguments:
    """Makes the tensors of a case from the command line's options, without writing to them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.shape: tuple[int, ...] = args.shape

    def tensor(self, *shape: int, grad: bool | None = None) -> Tensor:
        made = torch.empty(shape, dtype=self.args.dtype, device=self.args.device)
        return made.requires_grad_(self.args.grad if grad is None else grad)

    def like(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((1,) * len(shape), dtype=dtype, device=self.args.device).expand(shape)

    def rank(self, rank: int, names: str) -> None:
        if len(self.shape) != rank:
            raise UsageError(f"--shape must be {names} for {self.args.op}, got {self.args.shape}")

    @property
    def features(self) -> int:
        if not self.shape:
            raise UsageError(f"--shape must have at least one dimension for {self.args.op}")
        return self.shape[-1]


def _softmax(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    options: dict[str, Any] = {"is_causal": True} if a.args.causal else {}
    if a.args.mask:
        options["mask"] = a.like(*a.shape, dtype=torch.bool)
    return [a.tensor(*a.shape)], options


def _norm(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    inputs = [a.tensor(*a.shape)] * (2 if a.args.op.startswith("add_") else 1)
    weights = [a.tensor(a.features)] * (2 if a.args.op.endswith("layer_norm") else 1)
    options = {"dropout_p": a.args.dropout} if a.args.dropout else {}
    return [*inputs, (a.features,), *weights], options


def _linear(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    out = a.args.out_features or a.features
    joined = (*a.shape[:-1], out)
    weights = {"linear_add": 0, "linear_add_layer_norm": 2, "linear_add_rms_norm": 1}[a.args.op]
    options = {"dropout_p": a.args.dropout} if a.args.dropout else {}
    return [
        a.tensor(*a.shape),
        a.tensor(out, a.features),
        a.tensor(out),
        a.tensor(*joined),
        *[a.tensor(out)] * weights,
    ], options


def _output_layer(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    classes = a.args.out_features or a.features
    x, weight, bias = a.tensor(*a.shape), a.tensor(classes, a.features), a.tensor(classes)
    if a.args.op == "linear_cross_entropy":
        return [x, weight, a.like(*a.shape[:-1], dtype=torch.int64)], {"linear_bias": bias}
    return [x, weight, bias], {"k": 1} if a.args.op == "linear_topk" else {}


def _attention(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    a.rank(4, "BATCH,HEADS,SEQUENCE,HEAD_DIM")
    batch, heads, queries, dim = a.shape
    key = a.args.key_shape or a.shape
    if len(key) != 4:
        raise UsageError(f"--key-shape must be BATCH,HEADS,SEQUENCE,HEAD_DIM, got {key}")
    value = (*key[:3], a.args.value_dim or dim)
    tensors = [a.tensor(*a.shape), a.tensor(*key), a.tensor(*value)]
    args = a.args
    options: dict[str, Any] = {"is_causal": True} if args.causal else {}
    if args.dropout:
        options["dropout_p"] = args.dropout
    if args.op == "scaled_dot_product_attention":
        if key[1] != heads:
            options["enable_gqa"] = True
        if args.mask:
            options["attn_mask"] = a.like(queries, key[2], dtype=torch.bool)
        return tensors, options
    if args.bottom_right:
        options["causal_alignment"] = "bottom_right"
    if args.mask:
        options["mask"] = a.like(queries, key[2], dtype=torch.bool)
    if args.bias:
        options["bias"] = a.tensor(heads, queries, key[2])
    if args.window:
        options["window"] = tuple(args.window)
    if args.softcap is not None:
        options["softcap"] = args.softcap
    if args.alibi:
        options["alibi_slopes"] = a.like(heads, dtype=torch.float32)
    if args.sinks:
        options["sinks"] = a.tensor(heads)
    if args.key_lengths:
        options["key_lengths"] = a.like(batch, dtype=torch.int32)
    return tensors, options


def _varlen(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    """``--shape`` is the padded batch's, whose sequences are all of full length."""
    tensors, options = _attention(a)
    batch, bounds = a.shape[0], []
    for x in tensors[:2]:
        bounds.append(torch.arange(batch + 1, device=a.args.device) * x.shape[2])
    packed = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_(a.args.grad) for x in tensors]
    return [*packed, *bounds], options


def _decode(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    """``--shape`` is the query's, ``--key-shape`` the cache's."""
    (query, key, value), options = _attention(a)
    lengths = a.like(1, key.shape[0], dtype=torch.int32).contiguous().fill_(key.shape[2])
    cache = ft.KVCache(key.detach()[None], value.detach()[None], lengths)
    return [query, cache], {"is_causal": a.args.causal, **options}


def _merge(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    """``--shape`` is (parts, *, value_dim)."""
    if len(a.shape) < 2:
        raise UsageError(f"--shape must be PARTS,...,VALUE_DIM for {a.args.op}, got {a.shape}")
    wide = torch.promote_types(a.args.dtype, torch.float32)
    return [a.tensor(*a.shape), a.like(*a.shape[:-1], dtype=wide)], {}


def _cross_entropy(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    rows = a.shape[:1] + a.shape[2:] if len(a.shape) > 1 else ()
    return [a.tensor(*a.shape), a.like(*rows, dtype=torch.int64)], {}


def _embedding(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    """``--shape`` is the output's, (*, length, features)."""
    return [a.like(*a.shape[:-1], dtype=torch.int64), a.tensor(1, a.features)], {}


def _rotary(a: _Arguments) -> tuple[list[Any], dict[str, Any]]:
    a.rank(4, "BATCH,HEADS,SEQUENCE,HEAD_DIM")
    tables = [a.tensor(a.shape[2], a.shape[3] // 2, grad=False) for _ in range(2)]
    return [a.tensor(*a.shape), a.tensor(*a.shape), *tables], {}


@dataclass(frozen=True)
class _Family:
    """Operations that take the same options; ``options`` are the parser's names of them."""

    build: Callable[[_Arguments], tuple[list[Any], dict[str, Any]]]
    options: frozenset[str]


_ALL_ATTENTION = frozenset(
    {"causal", "bottom_right", "mask", "bias", "window", "softcap", "alibi", "sinks",
     "key_lengths", "dropout", "key_shape", "value_dim"}
)  # fmt: skip
_SOFTMAX = _Family(_softmax, frozenset({"causal", "mask"}))
_NORM = _Family(_norm, frozenset())
_ADD_NORM = _Family(_norm, frozenset({"dropout"}))
_LINEAR = _Family(_linear, frozenset({"out_features", "dropout"}))
_OUTPUT_LAYER = _Family(_output_layer, frozenset({"out_features"}))

FAMILIES: dict[str, _Family] = {
    "softmax": _SOFTMAX,
    "log_softmax": _SOFTMAX,
    "layer_norm": _NORM,
    "rms_norm": _NORM,
    "add_layer_norm": _ADD_NORM,
    "add_rms_norm": _ADD_NORM,
    "linear_add": _LINEAR,
    "linear_add_layer_norm": _LINEAR,
    "linear_add_rms_norm": _LINEAR,
    "linear_cross_entropy": _OUTPUT_LAYER,
    "linear_softmax": _OUTPUT_LAYER,
    "linear_topk": _OUTPUT_LAYER,
    "cross_entropy": _Family(_cross_entropy, frozenset()),
    "embedding": _Family(_embedding, frozenset()),
    "rotary_embedding": _Family(_rotary, frozenset()),
    "attention": _Family(_attention, _ALL_ATTENTION),
    "attention_varlen": _Family(_varlen, _ALL_ATTENTION - {"key_lengths"}),
    "attention_decode": _Family(
        _decode, _ALL_ATTENTION - {"key_lengths", "bottom_right", "dropout"}
    ),
    "merge_attention": _Family(_merge, frozenset()),
    "scaled_dot_product_attention": _Family(
        _attention, frozenset({"causal", "mask", "dropout", "key_shape", "value_dim"})
    ),
}


def _explain(args: argparse.Namespace) -> Explanation:
    if args.op not in TABLE and args.op not in ALIASES:
        raise UsageError(not_one_of(args.op, [*TABLE, *ALIASES]))
    if list(TABLE[ALIASES.get(args.op, args.op)]) == ["torch"]:
        return Explanation(args.op, "any arguments", "torch", (("others", "no kernel yet"),))
    if args.op in COMPOSED:
        made_of = COMPOSED[args.op]
        found = _explain(argparse.Namespace(**{**vars(args), "op": made_of}))
        return replace(found, op=args.op, case=f"made of {made_of}: {found.case}")
    family = FAMILIES[args.op]
    given = {name for name in _OPTIONS if getattr(args, name) not in (None, False)}
    foreign = sorted(given - family.options)
    if foreign:
        raise UsageError(f"{args.op} takes no --{foreign[0].replace('_', '-')}")
    if args.shape is None:
        raise UsageError(f"{args.op} needs --shape")
    try:
        arguments, options = family.build(_Arguments(args))
        if args.backend is not None:
            options["backend"] = args.backend
        return ft.explain(args.op, *arguments, **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UsageError(str(error).splitlines()[0]) from None


def run(args: argparse.Namespace) -> int:
    """1 if a forced backend can't do the case."""
    found = _explain(args)
    if args.json:
        rejected = [{"backend": name, "reason": reason} for name, reason in found.rejected]
        print_json({"op": found.op, "case": found.case, "backend": found.backend,
                    "rejected": rejected, "note": found.note})  # fmt: skip
    else:
        print(found)
    return 1 if found.backend == "none" else 0


_OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"action": "store_true", "help": "query i sees keys (or columns) up to i"},
    "bottom_right": {"action": "store_true", "help": "the causal rule ends in the last key"},
    "mask": {"action": "store_true", "help": "with a bool mask"},
    "bias": {"action": "store_true", "help": "with an additive bias (its gradient too if --grad)"},
    "window": {"type": int, "nargs": 2, "metavar": ("LEFT", "RIGHT"), "help": "sliding window"},
    "softcap": {"type": float, "metavar": "X", "help": "scores are capped to ±X"},
    "alibi": {"action": "store_true", "help": "with ALiBi slopes"},
    "sinks": {"action": "store_true", "help": "with attention sinks"},
    "key_lengths": {"action": "store_true", "help": "with a length for each sample's keys"},
    "dropout": {"type": float, "metavar": "P", "help": "dropout probability"},
    "key_shape": {"type": shape_of, "metavar": "B,G,T,D", "help": "default: the query's shape"},
    "value_dim": {"type": int, "metavar": "E", "help": "the value's head size; default: the key's"},
    "out_features": {"type": int, "metavar": "N", "help": "default: as many as come in"},
}  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "explain",
        "which backend runs a case, and why not the ones before it",
        "  fasttransformer explain attention --shape 1,8,128,64 --causal\n"
        "  fasttransformer explain attention --shape 2,32,512,128 --key-shape 2,8,512,128 \\\n"
        "      --dtype bf16 --window 256 0 --grad\n"
        "  fasttransformer explain softmax --shape 64,1000 --dtype float64\n"
        "  fasttransformer explain linear_add --shape 16,128,384 --out-features 1536 --json\n",
    )  # fmt: skip
    parser.add_argument("op", metavar="OP", help=f"one of {', '.join([*TABLE, *ALIASES])}")
    parser.add_argument("--shape", type=shape_of, metavar="N,N,…", help="the (first) input's shape")
    parser.add_argument("--dtype", type=dtype_of, default=torch.float32,
                        help="float32 (default), float16, bfloat16, float64")  # fmt: skip
    parser.add_argument("--device", type=device_of, default="cpu", help="cpu (default), cuda, …")
    parser.add_argument("--grad", action="store_true", help="a gradient is needed")
    parser.add_argument("--backend", choices=NAMES, help="force one")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    options = parser.add_argument_group("options of the operations")
    for name, settings in _OPTIONS.items():
        options.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.set_defaults(run=run)
