"""rms_norm forward and backward, against torch's own composition."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft

from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, w):
        return ft.rms_norm(x, w.shape, w, 1e-6)

    def torchs(x, w):
        return F.rms_norm(x, w.shape, w, 1e-6)

    return norm_cases("rms_norm", ours, torchs, adds=False, bias=False, quick=quick)


test_rms_norm = run_under_pytest
