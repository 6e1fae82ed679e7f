"""The CUDA kernels compiled without a GPU: registers, spills, shared memory and instructions.

Each .cu file is compiled once for each architecture of tests/cuda_resources.json and held to that
table: a change of a kernel that costs registers must change the table too, on purpose
(``python tests/test_cuda_build.py`` writes it anew). The library's bindings are compiled as well.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/cuda_resources.json"
NVCC = os.environ.get("NVCC", "nvcc")
ARCHS = ("80", "90a")
SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
SLACK = 8  # registers that another nvcc may give or take; the table's own nvcc is held to 0


def tool(name: str) -> str | None:
    """A CUDA binary tool from PATH, or the one that Triton's wheel carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    return str(path) if path.exists() else None


def missing() -> str | None:
    if shutil.which(NVCC) is None:
        return f"no CUDA compiler ({NVCC}) here"
    if tool("cuobjdump") is None:
        return "no cuobjdump here (CUDA toolkit, or Triton's wheel)"
    return None


if missing() and __name__ != "__main__":
    pytest.skip(missing() or "", allow_module_level=True)


def nvcc_version() -> str:
    out = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", out)
    return found[1] if found else "unknown"


def command(source: Path, arch: str, target: Path) -> list[str]:
    return [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DFT_CUDA",
            f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source),
            "-o", str(target), "-Werror=all-warnings"]  # fmt: skip


@functools.cache
def objects() -> dict[tuple[str, str], Path]:
    """(file, architecture) → its compiled object; two compilers run at a time."""
    folder = Path(tempfile.mkdtemp(prefix="ft_cuda_build_"))
    wanted = {(s.stem, arch): folder / f"{s.stem}.{arch}.o" for s in SOURCES for arch in ARCHS}

    def build(source: Path, arch: str) -> None:
        done = subprocess.run(command(source, arch, wanted[source.stem, arch]),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{source.name} for sm_{arch}:\n{done.stdout}{done.stderr}"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(build, s, arch) for s in SOURCES for arch in ARCHS]:
            job.result()
    return wanted


@functools.cache
def dump(path: Path, option: str) -> str:
    done = subprocess.run(
        [str(tool("cuobjdump")), option, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TYPES = {"f": "f32", "NS0_3f16E": "f16", "NS0_4bf16E": "bf16"}  # as the C++ ABI mangles them


def kernel_name(symbol: str) -> str:
    """A short name from a mangled one: softmax_held<bf16, 8>."""

    def take(text: str) -> tuple[str, str]:  # a name stands behind its length
        found = re.match(r"\d+", text)
        assert found, f"unexpected symbol {symbol}"
        end = found.end() + int(found[0])
        return text[found.end() : end], text[end:]

    _, rest = take(symbol.removeprefix("_ZN2ft4cuda"))  # the anonymous namespace
    name, rest = take(rest)
    if not rest.startswith("I"):
        return name
    arguments = []
    rest = rest[1:]
    while rest[0] in "NfL":
        if found := re.match(r"L[a-z](\d+)E", rest):  # a bool or an int
            arguments.append(found[1])
            rest = rest[found.end() :]
            continue
        code = next(code for code in TYPES if rest.startswith(code))
        arguments.append(TYPES[code])
        rest = rest.removeprefix(code)
    return f"{name}<{', '.join(arguments)}>"


@functools.cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture → kernel → registers, spills (stack bytes) and static shared memory."""
    table: dict[str, dict[str, dict[str, int]]] = {arch: {} for arch in ARCHS}
    for (_, arch), path in objects().items():
        text = dump(path, "--dump-resource-usage")
        for symbol, use in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text):
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", use)}
            table[arch][kernel_name(symbol)] = {
                "registers": numbers["REG"],
                "spills": numbers["STACK"] + numbers["LOCAL"],
                "shared": numbers["SHARED"],
            }
    return table


def sass(op: str, arch: str) -> dict[str, str]:
    parts = re.split(r"Function : (\w+)", dump(objects()[op, arch], "-sass"))
    return {kernel_name(symbol): text for symbol, text in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch):
    assert not {name: use for name, use in resources()[arch].items() if use["spills"]}


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory_are_those_of_the_table(arch):
    table = json.loads(TABLE.read_text())
    slack = 0 if table["nvcc"] == nvcc_version() else SLACK
    now = {name: use for name, use in sorted(resources()[arch].items())}
    assert sorted(now) == sorted(table[f"sm_{arch}"]), "write the table anew: see this file's top"
    for name, use in now.items():
        expected = table[f"sm_{arch}"][name]
        assert use["registers"] <= expected["registers"] + slack, name
        if slack == 0:
            assert use == expected, f"{name}: write the table anew if this is meant"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", [source.stem for source in SOURCES])
def test_rows_move_by_128_bits(op, arch):
    for name, text in sass(op, arch).items():
        if name == "row_norm_weights":
            continue  # sums float partials down columns, 32 neighbours at a time
        load = "LDGSTS" if name.startswith("row_norm_backward_held") else "LDG"
        assert re.search(load + r"\.E(\.\w+)*\.128", text), f"{name}: no 128-bit load"
        if name.startswith("row_norm_columns"):
            continue
        assert re.search(r"STG\.E(\.\w+)*\.128", text), f"{name}: no 128-bit store"
        assert "LDL" not in text and "STL" not in text, f"{name}: local memory"


@pytest.mark.parametrize("op", [source.stem for source in SOURCES])
def test_bindings_compile_for_cuda(op, tmp_path):
    include = Path(torch.__file__).resolve().parent / "include"
    done = subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-DFT_CUDA", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}",
         "-isystem", str(include), "-Wall", "-Wextra", str(ROOT / f"csrc/bindings/{op}.cpp")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr


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
    table = {"nvcc": nvcc_version()}
    table |= {f"sm_{arch}": dict(sorted(kernels.items())) for arch, kernels in resources().items()}
    text = json.dumps(table, indent=1)
    one_line = re.compile(r"\{\s+(\"registers\".*?)\s+\}", re.S)  # a kernel's entry
    text = one_line.sub(lambda m: "{" + " ".join(m[1].split()) + "}", text)
    TABLE.write_text(text + "\n")
    print(f"wrote {TABLE}")
