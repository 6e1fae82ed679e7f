"""linear_add_layer_norm: output projection, residual and LayerNorm in one, beside torch."""

from __future__ import annotations

import torch.nn.functional as F

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.benchmarks._linear import norm_cases
from fasttransformer.benchmarks._shared import Case, run_under_pytest


def _torch(x, weight, bias, residual, norm_weight, norm_bias):
    summed = F.linear(x, weight, bias) + residual
    return F.layer_norm(summed, summed.shape[-1:], norm_weight, norm_bias), summed


def cases(quick: bool = False) -> list[Case]:
    functions = (ft.linear_add_layer_norm, _torch, reference.linear_add_layer_norm)
    return norm_cases("linear_add_layer_norm", functions, 2, quick)


test_linear_add_layer_norm = run_under_pytest
