"""The CPU kernels' instruction sets: which one runs, and that none disturbs torch's."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fasttransformer as ft
from contract import ISAS, runnable, running_on

HERE = [name.removeprefix("cpu:") for name in runnable() if name.startswith("cpu:")]
pytestmark = pytest.mark.skipif(not HERE, reason="the C++ library is not built")


@pytest.mark.parametrize("asked", ["portable", "amx", "mmx"])
def test_environment_variable(asked):
    """A lower set than the CPU's is taken, a higher one is the CPU's best, an unknown one too."""
    code = "import torch, fasttransformer; print(torch.ops.fasttransformer.cpu_isa())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTTRANSFORMER_CPU_ISA": asked},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == (asked if asked in HERE else HERE[-1])


def test_what_the_cpu_lacks_is_refused():
    before = torch.ops.fasttransformer.cpu_isa()
    for name in (*(name for name in ISAS if name not in HERE), "mmx", ""):
        assert not torch.ops.fasttransformer.set_cpu_isa(name)
        assert torch.ops.fasttransformer.cpu_isa() == before


@pytest.mark.parametrize("isa", HERE)
def test_products_in_turn_with_torch(isa):
    """Where bf16 goes through tile registers both configure them, on threads that both use."""
    x, w = torch.randn(300, 200).bfloat16(), torch.randn(90, 200).bfloat16()
    q = torch.randn(1, 2, 150, 40).bfloat16()
    want = F.linear(x, w)

    def turns(_: int) -> None:
        ours = ft.linear_add(x, w)
        for _ in range(20):
            assert torch.equal(F.linear(x, w), want)
            assert torch.equal(ft.linear_add(x, w), ours)
            ft.attention(q, q, q)

    with running_on(f"cpu:{isa}"):
        turns(0)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(turns, range(2)))
