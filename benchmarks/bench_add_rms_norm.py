"""add_rms_norm forward and backward, against torch's own composition."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference

from ._norms import norm_cases
from ._shared import Case, run_under_pytest


def cases(quick: bool = False) -> list[Case]:
    def ours(x, r, w):
        return ft.add_rms_norm(x, r, w.shape, w, 1e-6)

    def torchs(x, r, w):
        summed = x + r
        return F.rms_norm(summed, w.shape, w, 1e-6), summed

    def wanted(x, r, w):
        return reference.add_rms_norm(x, r, w.shape, w, 1e-6)

    return norm_cases("add_rms_norm", (ours, torchs, wanted), adds=True, bias=False, quick=quick)


test_add_rms_norm = run_under_pytest
