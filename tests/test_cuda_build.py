"""The CUDA kernels compiled without a GPU: registers, spills, shared memory and instructions.

Each .cu file is compiled for the architectures of tests/cuda_resources.json and held to that table:
a change of a kernel that costs registers, or loses a tensor-core instruction, must change the table
too, on purpose (``python tests/test_cuda_build.py`` writes it anew). sm_90 and sm_100 are made from
the PTX of compute_80, as a driver makes them from what the library carries for later GPUs; Hopper's
own code is sm_90a. The library's bindings are compiled as well.
"""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/cuda_gates"
TABLE = ROOT / "tests/cuda_resources.json"
NVCC = os.environ.get("NVCC", "nvcc")
SOURCES = sorted(s for s in (ROOT / "csrc/cuda").rglob("*.cu") if s.parent.name != "device")
OPS = sorted(source.stem for source in (ROOT / "csrc/cuda").glob("*.cu"))
SLACK = 8  # registers that another nvcc may give or take; the table's own nvcc is held to 0

#: Architectures whose machine code is read (2 s a file each); of the others, resources are.
DISASSEMBLED = ("sm_80", "sm_90a")

#: What the table counts there: tensor cores, ldmatrix, cp.async, 128-bit loads and stores of global
#: memory.
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",
    "LDSM": r"\bLDSM\.",
    "LDGSTS": r"\bLDGSTS\.",
    "LDG.128": r"\bLDG\.E(?:\.\w+)*\.128",
    "STG.128": r"\bSTG\.E(?:\.\w+)*\.128",
}

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


def tool(name: str) -> str | None:
    """A CUDA binary tool from PATH, or the one that Triton's wheel carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    return str(path) if path.exists() else None


def missing() -> str | None:
    for name in (NVCC, "c++filt"):
        if shutil.which(name) is None:
            return f"no {name} here"
    if tool("cuobjdump") is None:
        return "no cuobjdump here (CUDA toolkit, or Triton's wheel)"
    return None


if missing() and __name__ != "__main__":
    pytest.skip(missing() or "", allow_module_level=True)


@functools.cache
def nvcc_version() -> str:
    out = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", out)
    return found[1] if found else "unknown"


@functools.cache
def archs() -> tuple[str, ...]:
    out = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout
    return ("sm_80", "sm_90", "sm_90a", *(["sm_100"] if "sm_100\n" in out else []))


@functools.cache
def objects() -> dict[str, Path]:
    """Source → its object with the code of every architecture; ninja makes what changed."""
    from_ptx = ",".join(arch for arch in archs() if arch != "sm_90a")
    flags = [
        *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DFT_CUDA", f"-I{ROOT / 'csrc'}"),
        f"-gencode=arch=compute_80,code=[{from_ptx}]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Werror=all-warnings",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    names = {str(s.relative_to(ROOT / "csrc/cuda")): s for s in SOURCES}
    made = {name: name.replace("/", ".")[:-3] + ".o" for name in names}
    lines = [
        "rule nvcc",
        f"  command = {NVCC} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {made[name]}: nvcc {names[name]}" for name in names),
        "",
    ]
    (BUILD / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD), "-j", "2"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: BUILD / made[name] for name in names}


def dump(path: Path, arch: str, option: str) -> str:
    done = subprocess.run([str(tool("cuobjdump")), "-arch", arch, option, str(path)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_names(symbols: list[str]) -> dict[str, str]:
    """Mangled → short: softmax_held<bf16, 8>."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    short = {}
    for symbol, name in zip(symbols, text.stdout.splitlines()):
        name = re.sub(r"\(anonymous namespace\)::|ft::cuda::|^void |\(bool\)|\(int\)", "", name)
        short[symbol] = name[: name.rindex("(")].replace("float", "f32")
    return short


def resources_of(path: Path, arch: str) -> dict[str, dict[str, int]]:
    text = dump(path, arch, "--dump-resource-usage")
    use = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text))
    code: dict[str, str] = {}
    if arch in DISASSEMBLED:
        parts = re.split(r"Function : (\w+)", dump(path, arch, "-sass"))
        code = dict(zip(parts[1::2], parts[2::2]))
    rows = {}
    for symbol, name in kernel_names(list(use)).items():
        numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", use[symbol])}
        sass = code.get(symbol, "")
        counts = {what: len(re.findall(p, sass)) for what, p in INSTRUCTIONS.items()}
        rows[name] = {
            "registers": numbers["REG"],
            "spills": numbers["STACK"] + numbers["LOCAL"],
            "shared": numbers["SHARED"],
            **{what: count for what, count in counts.items() if count},
        }
    return rows


@functools.cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture → kernel → registers, spills (bytes of stack), static shared memory, code."""
    table: dict[str, dict[str, dict[str, int]]] = {arch: {} for arch in archs()}
    jobs = [(path, arch) for path in objects().values() for arch in archs()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (_, arch), rows in zip(jobs, pool.map(lambda job: resources_of(*job), jobs)):
            table[arch] |= rows
    return table


def kind(name: str) -> str:
    return name.partition("<")[0]


if missing() is None:
    every_arch = pytest.mark.parametrize("arch", archs())


@every_arch
def test_no_kernel_spills(arch):
    assert not {name: use["spills"] for name, use in resources()[arch].items() if use["spills"]}


@every_arch
def test_registers_shared_memory_and_instructions_are_those_of_the_table(arch):
    table = json.loads(TABLE.read_text())
    slack = 0 if table["nvcc"] == nvcc_version() else SLACK
    now = {name: use for name, use in sorted(resources()[arch].items())}
    assert sorted(now) == sorted(table[arch]), "write the table anew: see this file's top"
    for name, use in now.items():
        expected = table[arch][name]
        assert use["registers"] <= expected["registers"] + slack, name
        assert {*use} >= {*expected}, f"{name}: instructions are gone"
        if slack == 0:
            assert use == expected, f"{name}: write the table anew if this is meant"


@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_rows_move_by_128_bits(arch):
    narrow = collections.defaultdict(list)
    for name, use in resources()[arch].items():
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
    """Loads a stand-in for the CUDA library on a made-up GPU: what _load_cuda() answers."""
    backends = importlib.import_module("fasttransformer.backends")

    def call(capability: tuple[int, int], problem: str = "", broken: bool = False) -> str | None:
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
        monkeypatch.setattr(backends, "_library", lambda name: library)
        monkeypatch.setattr(backends, "_unavailable", {})
        for name, value in (
            ("is_available", True),
            ("device_count", 1),
            ("get_device_capability", capability),
            ("get_device_name", "GPU Z"),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        backends._gpu_problem.cache_clear()
        return backends._load_cuda() or backends._gpu_problem()

    yield call
    backends._gpu_problem.cache_clear()


def test_a_gpu_that_the_cuda_library_can_run_on(load_cuda):
    assert load_cuda((9, 0)) is None
    found = importlib.import_module("fasttransformer.backends").cuda_library()
    assert found["archs"] == "80 90a" and found["nvcc"] == "13.0" and found["bytes"] > 0


def test_a_gpu_that_it_can_not_run_on_has_a_reason(load_cuda):
    reason = load_cuda((7, 5))
    assert reason == (
        "GPU 0 (GPU Z) is of compute capability 7.5; the CUDA kernels need 8.0 or later"
    )
    problem = "the CUDA library holds code for 90a: no kernel image is available"
    assert load_cuda((8, 6), problem) == f"GPU 0 (GPU Z): {problem}"
    assert load_cuda((9, 0), broken=True).startswith("the CUDA library does not load: ")


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
        ("12.4", "1", "sm_80", None, "'sm_80' is no architecture"),
    ),
)
def test_setup_decides_and_says_why(wants_cuda, version, asked, archs, answer, message):
    got, said = wants_cuda(version, asked, archs)
    assert (got, message in said) == (answer, True), said


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_setup_leaves_cuda_out_under_a_torch_without_it(wants_cuda):
    got, said = wants_cuda("12.4", "", "")
    assert got is False and "the installed torch has no CUDA" in said


if __name__ == "__main__":
    assert not missing(), missing()
    table: dict = {"nvcc": nvcc_version()}
    table |= {arch: dict(sorted(kernels.items())) for arch, kernels in resources().items()}
    text = json.dumps(table, indent=1)
    one_line = re.compile(r"\{\s+(\"registers\".*?)\s+\}", re.S)  # a kernel's entry
    text = one_line.sub(lambda m: "{" + " ".join(m[1].split()) + "}", text)
    TABLE.write_text(text + "\n")
    print(f"wrote {TABLE}")
