"""layer_norm forward and backward, against torch's own composition."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft

from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, w, b):
        return ft.layer_norm(x, w.shape, w, b)

    def torchs(x, w, b):
        return F.layer_norm(x, w.shape, w, b)

    return norm_cases("layer_norm", ours, torchs, adds=False, bias=True, quick=quick)


test_layer_norm = run_under_pytest
