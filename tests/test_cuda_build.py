"""The CUDA kernels compiled without a GPU: registers, spills, shared memory and instructions.

Each .cu file is compiled for the architectures of tests/cuda_resources.json and held to that table:
a change of a kernel that costs registers, or loses a tensor-core instruction, must change the table
too, on purpose (``python tests/cuda_objects.py`` writes it anew). Where the sources and the
compiler are those that the table was made of, one file is compiled instead of all
(cuda_objects.py). The library's bindings are compiled as well.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_objects import (
    DISASSEMBLED,
    NVCC,
    OPS,
    ROOT,
    SLACK,
    TABLE,
    archs,
    compiled,
    is_of_these_sources,
    missing,
    nvcc_version,
)

from fasttransformer import _libraries

#: Kernels that move few numbers, one at a time or a float at a time, and why.
NARROW_LOADS = {
    "row_norm::sum_partials": "sums float partials down columns, 32 neighbours at a time",
    "embedding_clear": "writes zeros",
    "attention_backward_add_parts": "sums float parts, neighbours by neighbours",
    "attention_backward_sinks": "one number per query",
    "attention_merge": "few rows, neighbours by neighbours",
    "attention_check_boundaries": "two numbers per sequence",
}
NARROW_STORES = {
    **NARROW_LOADS,
    "attention_backward_walk": "stores fragments as they lie in registers, once for all its steps",
    "attention_backward_dbias": "the same",
    "attention_backward_rows": "stores one sum per query",
    "linear_column_sums": "stores one sum per column",
    "row_norm::backward_columns": "stores one sum per column",
}

if missing():
    pytest.skip(missing() or "", allow_module_level=True)


def kind(name: str) -> str:
    return name.partition("<")[0]


every_arch = pytest.mark.parametrize("arch", archs())


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


@pytest.fixture(scope="module")
def resources(request, table):
    """What the sources at hand compile to."""
    believed = is_of_these_sources(table) and not request.config.getoption("--all")
    return table if believed else compiled()


@every_arch
def test_no_kernel_spills(arch, resources):
    assert not {name: use["spills"] for name, use in resources[arch].items() if use["spills"]}


@pytest.mark.parametrize("source", ["add_rms_norm.cu"])
def test_a_file_compiles_to_what_the_table_has(source, table):
    if table["nvcc"] != nvcc_version():
        pytest.skip("the table is another compiler's; see below")
    for arch, kernels in compiled(source).items():
        assert kernels and kernels == {name: table[arch].get(name) for name in kernels}


@every_arch
def test_registers_shared_memory_and_instructions_are_those_of_the_table(arch, resources, table):
    slack = 0 if table["nvcc"] == nvcc_version() else SLACK
    now = {name: use for name, use in sorted(resources[arch].items())}
    assert sorted(now) == sorted(table[arch]), "write the table anew: see this file's top"
    for name, use in now.items():
        expected = table[arch][name]
        assert use["registers"] <= expected["registers"] + slack, name
        assert use["threads"] == expected["threads"], name
        assert {*use} >= {*expected}, f"{name}: instructions are gone"
        if slack == 0:
            assert use == expected, f"{name}: write the table anew if this is meant"


@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_rows_move_by_128_bits(arch, resources):
    narrow = collections.defaultdict(list)
    for name, use in resources[arch].items():
        if kind(name) not in NARROW_LOADS and not {"LDG.128", "LDGSTS"} & {*use}:
            narrow["loads"].append(name)
        if kind(name) not in NARROW_STORES and "STG.128" not in use:
            narrow["stores"].append(name)
    assert not narrow


@pytest.mark.parametrize("op", OPS)
def test_bindings_compile_for_cuda(op, tmp_path):
    include = Path(torch.__file__).resolve().parent / "include"
    done = subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-fvisibility=hidden",
         "-DFT_CUDA", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}",
         "-isystem", str(include), "-Wall", "-Wextra", str(ROOT / f"csrc/bindings/{op}.cpp")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr


# ---- loading ------------------------------------------------------------------------------------


@pytest.fixture
def load_cuda(tmp_path, monkeypatch):
    """Loads a stand-in for the CUDA library on a made-up GPU: (reason against it, path)."""

    def call(capability: tuple[int, int], problem: str = "", broken: bool = False):
        source = tmp_path / "library.cpp"
        library = tmp_path / f"library{len(list(tmp_path.iterdir()))}.so"  # a name is loaded once
        marker = "fasttransformer CUDA library: archs 80 90a; nvcc 13.0;"
        source.write_text(
            f'extern "C" const char* ft_cuda_problem(int, int) {{ return "{problem}"; }}\n'
            f'const char* volatile marker = "{marker}";\n'
        )
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
        if broken:
            library.write_text("no library")
        for name, value in (
            ("is_available", True),
            ("device_count", 1),
            ("get_device_capability", capability),
            ("get_device_name", "GPU Z"),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        return _libraries.load_cuda(None, library) or _libraries.gpu_problem(library), library

    return call


def test_a_gpu_that_the_cuda_library_can_run_on(load_cuda):
    problem, library = load_cuda((9, 0))
    assert problem is None
    found = _libraries.cuda_library(library)
    assert found["archs"] == "80 90a" and found["nvcc"] == "13.0" and found["bytes"] > 0


def test_a_gpu_that_it_can_not_run_on_has_a_reason(load_cuda):
    reason, _ = load_cuda((7, 5))
    assert reason == (
        "GPU 0 (GPU Z) is of compute capability 7.5; the CUDA kernels need 8.0 or later"
    )
    problem = "the CUDA library holds code for 90a: no kernel image is available"
    assert load_cuda((8, 6), problem)[0] == f"GPU 0 (GPU Z): {problem}"
    assert load_cuda((9, 0), broken=True)[0].startswith("the CUDA library does not load: ")


@pytest.mark.parametrize(
    ("archs", "runs", "runs_not"),
    (
        ("80 90a", ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)), ((7, 5),)),  # by PTX from 9.0 on
        ("90a", ((9, 0),), ((8, 6), (10, 0))),
        ("86", ((8, 6), (8, 9), (9, 0)), ((8, 0),)),
        ("100f", ((10, 0), (10, 3)), ((9, 0), (12, 0))),
    ),
)
def test_which_gpus_code_for_an_architecture_runs_on(archs, runs, runs_not, tmp_path):
    target = tmp_path / "library.so"
    subprocess.run(
        [NVCC, "-std=c++20", "-DFT_CUDA", f"-I{ROOT / 'csrc'}", f'-DFT_CUDA_ARCHS="{archs}"',
         "-shared", "-Xcompiler=-fPIC", ROOT / "csrc/cuda/device/library.cu", "-o", target],
        check=True,
    )  # fmt: skip
    problem_of = ctypes.CDLL(str(target)).ft_cuda_problem
    problem_of.restype = ctypes.c_char_p
    for capability in (*runs, *runs_not):
        holds = f"the CUDA library holds code for {archs}, not" in problem_of(*capability).decode()
        assert holds == (capability in runs_not), capability


# ---- setup.py's choice --------------------------------------------------------------------------


@pytest.fixture
def wants_cuda(tmp_path, monkeypatch, capsys):
    """Calls setup.py's wants_cuda() with a made-up nvcc of some version: (answer, what it said)."""
    source = (ROOT / "setup.py").read_text().split("\nEXTENSIONS = ")[0]

    def call(version: str | None, asked: str, archs: str) -> tuple[bool | None, str]:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\ncase $1 in --version) echo release {version},;;\n"
                        "*) echo compute_80; echo compute_90;; esac\n")  # fmt: skip
        nvcc.chmod(0o755)
        monkeypatch.setenv("NVCC", str(nvcc) if version else "/no/nvcc")
        for name, value in (("", asked), ("_ARCHS", archs)):
            monkeypatch.delenv(f"FASTTRANSFORMER_CUDA{name}", raising=False)
            if value:
                monkeypatch.setenv(f"FASTTRANSFORMER_CUDA{name}", value)
        space = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
        exec(compile(source, "setup.py", "exec"), space)
        try:
            return space["wants_cuda"](), capsys.readouterr().err
        except SystemExit as stop:
            return None, str(stop)

    return call


@pytest.mark.parametrize(
    ("version", "asked", "archs", "answer", "message"),
    (
        ("12.4", "0", "", False, "FASTTRANSFORMER_CUDA=0: the CUDA kernels are left out"),
        ("12.4", "yes", "", None, "it must be 0, 1 or unset"),
        ("12.4", "1", "80,90a", True, ""),
        (None, "1", "80", None, "no CUDA compiler (/no/nvcc) was found"),
        ("12.3", "1", "80", None, "12.3, which is too old (12.4 at least)"),
        ("12.4", "1", "75", None, "75 is older than 80"),
        ("12.4", "1", "80;100a", None, "does not know 100a; it knows 80, 90"),
        ("12.4", "1", "sm_80", None, "'sm_80' is not an architecture"),
    ),
)
def test_setup_decides_and_says_why(wants_cuda, version, asked, archs, answer, message):
    got, said = wants_cuda(version, asked, archs)
    assert (got, message in said) == (answer, True), said


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_setup_leaves_cuda_out_under_a_torch_without_it(wants_cuda):
    got, said = wants_cuda("12.4", "", "")
    assert got is False and "the installed torch has no CUDA" in said
