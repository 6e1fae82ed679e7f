"""add_layer_norm forward and backward, against torch's own composition and onnxruntime."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference

from . import peers
from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, r, w, b):
        return ft.add_layer_norm(x, r, w.shape, w, b)

    def torchs(x, r, w, b):
        summed = x + r
        return F.layer_norm(summed, w.shape, w, b), summed

    def wanted(x, r, w, b):
        return reference.add_layer_norm(x, r, w.shape, w, b)

    def onnx(x, r, w, b):
        return peers.present(onnxruntime=peers.onnx_add_layer_norm(x, r, w, b, 1e-5))

    return norm_cases(
        "add_layer_norm", (ours, torchs, wanted), adds=True, bias=True, quick=quick, onnx=onnx
    )


test_add_layer_norm = run_under_pytest
