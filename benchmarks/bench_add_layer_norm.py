"""add_layer_norm forward and backward, against torch's own composition."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft

from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, r, w, b):
        return ft.add_layer_norm(x, r, w.shape, w, b)

    def torchs(x, r, w, b):
        summed = x + r
        return F.layer_norm(summed, w.shape, w, b), summed

    return norm_cases("add_layer_norm", ours, torchs, adds=True, bias=True, quick=quick)


test_add_layer_norm = run_under_pytest
