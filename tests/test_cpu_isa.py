"""The CPU kernels' instruction sets: which one runs, that none disturbs torch's, and that the tests
pass on a CPU that has fewer."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import SETS, refuse_absent_sets

import fasttransformer as ft
from contract import running_on
from fasttransformer._contract import ISAS

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(not SETS, reason="the C++ library is not built")


#: Prints, for each value of FASTTRANSFORMER_CPU_ISA, the set in use, whether the process has asked
#: Linux for AMX's registers, and the sets that can be chosen. torch is imported once for all.
PROBE = """
import ctypes, os, platform, sys, torch
library, *values = sys.argv[1:]
for value in values:
    if os.fork() == 0:
        os.environ["FASTTRANSFORMER_CPU_ISA"] = value
        torch.ops.load_library(library)
        operators, permitted = torch.ops.fasttransformer, ctypes.c_uint64()
        used = operators.cpu_isa()
        if sys.platform == "linux" and platform.machine() == "x86_64":
            ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(permitted))  # ARCH_GET_XCOMP_PERM
        sets = "portable", "avx2", "avx512", "avx512_bf16", "amx"
        print(used, permitted.value >> 18 & 1, *filter(operators.set_cpu_isa, sets), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_environment_variable_hides_the_sets_above_it():
    """And Linux is asked for AMX's registers where amx can run alone. An unknown name changes
    nothing but prints a warning."""
    values = ["", "AVX2", *ISAS]
    library = Path(ft.__file__).with_name("_cpu.abi3.so")
    found = subprocess.run(
        [sys.executable, "-c", PROBE, library, *values], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in found.stdout.splitlines()]
    used, asked, *of_this_cpu = lines[0]
    assert used == of_this_cpu[-1] and asked == str(int(used == "amx"))
    assert lines[1] == lines[0]
    assert found.stderr.count("FASTTRANSFORMER_CPU_ISA") == 1
    assert "FASTTRANSFORMER_CPU_ISA=AVX2 is ignored, it is not one of portable avx2" in found.stderr
    for i, line in enumerate(lines[2:]):
        left = [name for name in ISAS[: i + 1] if name in of_this_cpu]
        assert line == [left[-1], str(int(left[-1] == "amx")), *left]


def test_absent_sets_are_refused():
    before = torch.ops.fasttransformer.cpu_isa()
    for name in (*(name for name in ISAS if name not in SETS), "mmx", "AVX2"):
        assert not torch.ops.fasttransformer.set_cpu_isa(name)
        assert torch.ops.fasttransformer.cpu_isa() == before
        with pytest.raises(ValueError, match=f"no {name} kernels"), running_on(f"cpu:{name}"):
            pass


def test_a_test_that_names_an_absent_set_is_an_error(monkeypatch):
    class Item:
        nodeid = "test_file.py::test_name"

        def __init__(self, **parameters):
            self.callspec = SimpleNamespace(params=parameters)

        def setup(self):
            pass

    monkeypatch.setattr("instruction_sets.SETS", ["portable", "avx2"])
    good = [Item(on="cpu:avx2"), Item(isa="portable", rows=3), Item(on="torch"), Item()]
    bad = [Item(on="cpu:avx512"), Item(isa="amx"), Item(whatever="amx", on="cpu:avx2")]
    refuse_absent_sets(good + bad)
    for item in good:
        item.setup()
    for item in bad:
        with pytest.raises(pytest.fail.Exception, match=r"test_name: .* names a.*can't run here"):
            item.setup()


#: Runs pytest once per lower set in a child of its own. What the tests import that takes seconds
#: and asks for no instruction set is imported once for all. torch.compile's cache is the set's own:
#: torch 2.13 loads from it what was made under another ATEN_CPU_CAPABILITY, which computes garbage.
PYTEST = """
import contextlib, os, sys
import conftest, hypothesis, pytest, torch.distributed.fsdp
with contextlib.suppress(ImportError):
    import transformers
failed = False
for best in sys.argv[1].split():
    print("FASTTRANSFORMER_CPU_ISA:", best, flush=True)
    if os.fork() == 0:
        os.environ["FASTTRANSFORMER_CPU_ISA"] = best
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(sys.argv[2], best)
        import instruction_sets
        os.environ.update(instruction_sets.TORCH_ENVIRONMENT[best])
        status = pytest.main(sys.argv[3:], plugins=[instruction_sets])
        sys.stdout.flush()
        os._exit(status)
    failed |= os.wait()[1] != 0
sys.exit(failed)
"""


@pytest.mark.skipif(len(SETS) < 2, reason="there is no lower set")
def test_the_suite_on_lesser_cpus(tmp_path, request):
    """Collects all tests as on CPUs of lower sets; runs those that choose sets, and a few more.

    The lowest set, which lacks all that a test could ask for unlooked, and the next below this
    CPU's; with ``--all`` those between, too. ``FASTTRANSFORMER_CPU_ISA=avx2 make test`` runs every
    test on one.
    """
    lower = SETS[:-1]
    if not request.config.getoption("--all"):
        lower = list(dict.fromkeys([lower[0], lower[-1]]))
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "--assert=plain"]
    for test in (test_the_suite_on_lesser_cpus, test_environment_variable_hides_the_sets_above_it):
        options.append(f"--deselect=tests/{Path(__file__).name}::{test.__name__}")
    found = subprocess.run(
        [sys.executable, "-c", PYTEST, " ".join(lower), tmp_path, ".", *options],
        cwd=TESTS, env=environment | {"PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("isa", SETS)
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
