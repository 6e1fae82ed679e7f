"""rms_norm forward and backward, against torch."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference

from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, w):
        return ft.rms_norm(x, w.shape, w, 1e-6)

    def torchs(x, w):
        return F.rms_norm(x, w.shape, w, 1e-6)

    def wanted(x, w):
        return reference.rms_norm(x, w.shape, w, 1e-6)

    return norm_cases("rms_norm", (ours, torchs, wanted), adds=False, bias=False, quick=quick)


test_rms_norm = run_under_pytest
