"""layer_norm forward and backward, against torch and onnxruntime."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference

from . import peers
from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, w, b):
        return ft.layer_norm(x, w.shape, w, b)

    def torchs(x, w, b):
        return F.layer_norm(x, w.shape, w, b)

    def wanted(x, w, b):
        return reference.layer_norm(x, w.shape, w, b)

    def onnx(x, w, b):
        return peers.present(onnxruntime=peers.onnx_layer_norm(x, w, b, 1e-5))

    return norm_cases(
        "layer_norm", (ours, torchs, wanted), adds=False, bias=True, quick=quick, onnx=onnx
    )


test_layer_norm = run_under_pytest
