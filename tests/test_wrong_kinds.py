"""f14: what is no tensor, no number, or out of range, is named by a TypeError or ValueError."""

import inspect

import pytest
import torch
from fronts import refuses
from operation_cases import CASES, assembled

import fasttransformer as ft


def arguments_of(case):
    return {**assembled(case.tensors(case.n)), **case.options(case.n)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_none_and_what_is_no_tensor_is_named(case, autocast):
    """For every tensor argument; None is all right only where the signature says so."""
    parameters = inspect.signature(getattr(ft, case.op)).parameters
    for name, given in arguments_of(case).items():
        if not isinstance(given, (torch.Tensor, list, ft.KVCache)):
            continue
        errors = ValueError if name == "rotary" else TypeError  # which is a pair
        optional = "None" in str(parameters[name].annotation)
        for wrong in ["a text", 3, *([] if optional else [None])]:
            with torch.autocast("cpu", enabled=autocast), pytest.raises(errors) as caught:
                getattr(ft, case.op)(**arguments_of(case) | {name: wrong})
            assert str(caught.value).startswith(f"{case.op}: "), caught.value
            assert name.removeprefix("linear_") in str(caught.value), caught.value


X, W, R = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
DROPPING = {
    "linear_add": {"input": X, "weight": W},
    "linear_add_layer_norm": {"input": X, "weight": W},
    "linear_add_rms_norm": {"input": X, "weight": W},
    "add_layer_norm": {"input": X, "residual": X, "normalized_shape": 3},
    "add_rms_norm": {"input": X, "residual": X, "normalized_shape": 3},
    "feed_forward": {"input": X, "weight_in": W, "bias_in": None, "weight_out": torch.ones(3, 4),
                     "bias_out": None},
    "attention": dict.fromkeys(("query", "key", "value"), torch.ones(1, 1, 2, 4)),
    "scaled_dot_product_attention": dict.fromkeys(
        ("query", "key", "value"), torch.ones(1, 1, 2, 4)
    ),
    "attention_varlen": {
        **dict.fromkeys(("query", "key", "value"), torch.ones(2, 1, 4)),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 2])),
    },
}  # fmt: skip


@pytest.mark.parametrize("op", DROPPING)
def test_dropout_p_that_is_no_number(op):
    for wrong in (torch.tensor(0.1), "0.1", None):
        refuses(op, DROPPING[op], {"dropout_p": wrong}, TypeError, "dropout_p must be a number")
    for wrong in (-0.1, 1.5, float("nan")):
        refuses(op, DROPPING[op], {"dropout_p": wrong}, ValueError, "dropout_p is")


LOSSES = {
    "cross_entropy": {"input": X, "target": torch.tensor([1, 2])},
    "linear_cross_entropy": {"input": X, "linear_weight": W, "target": torch.tensor([1, 2])},
}


@pytest.mark.parametrize("op", LOSSES)
def test_ignore_index_that_is_no_int64(op):
    for wrong in (2**63, -(2**63) - 1):
        refuses(op, LOSSES[op], {"ignore_index": wrong}, ValueError, "must fit into 64 bits")
    refuses(op, LOSSES[op], {"ignore_index": 1.5}, TypeError, "must be an integer")


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_softcap_that_is_0_or_infinite_in_float32(op):
    for wrong in (1e-46, 1e39, 0.0, -1.0, float("nan")):
        refuses(op, DROPPING[op], {"softcap": wrong}, ValueError, f"softcap is {wrong}")
    for wrong in ("3", [3.0]):
        refuses(op, DROPPING[op], {"softcap": wrong}, TypeError, "softcap must be a number")
        refuses(op, DROPPING[op], {"scale": wrong}, TypeError, "scale must be a number")


@pytest.mark.parametrize("op", ["linear_softmax", "linear_topk"])
def test_temperature_that_is_0_in_float32(op):
    given = {"input": X, "weight": W, **({"k": 1} if op == "linear_topk" else {})}
    refuses(op, given, {"temperature": 1e-46}, ValueError, "temperature is 1e-46; it must be 1.2e")


options = getattr(torch.nn, "LinearCrossEntropyOptions", None)


def test_options_of_linear_cross_entropy():
    """f19: torch 2.13's options are taken, and what can't be met is refused."""
    given = LOSSES["linear_cross_entropy"]
    refuses("linear_cross_entropy", given, {"options": {}}, TypeError, "options must be a")
    if options is None:
        return
    want = ft.linear_cross_entropy(**given)
    for how in ({}, {"batch_chunk_size": 1, "chunking_method": None}, {"acc_policy": "compact"},
                {"allow_retain_graph": True}, {"acc_dtype": torch.float32}):  # fmt: skip
        assert torch.equal(ft.linear_cross_entropy(**given, options=options(**how)), want)
    wide = options(acc_dtype=torch.float64)
    refuses("linear_cross_entropy", given, {"options": wide}, ValueError, "acc_dtype")
    doubles = {**given, "input": X.double(), "linear_weight": W.double()}
    ft.linear_cross_entropy(**doubles, options=wide)
