"""The CUDA kernels compiled without a GPU, and what the compiler made of each: registers, spills,
shared memory, threads of a block, instructions.

Each .cu file is compiled for the architectures of tests/cuda_resources.json. sm_90 and sm_100 are
made from the PTX of compute_80, as a driver makes them from what the library carries for later
GPUs; Hopper's own code is sm_90a. ``python tests/cuda_objects.py`` writes the table anew.

The table says which sources it was made of, by their content. Where those are the sources at hand,
and the compiler is the same, to compile them all again (eight minutes on two cores) would tell
nothing new: test_cuda_build.py reads the table then, and compiles one file to see that it can be
believed. ``pytest --all`` compiles every file.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


@functools.cache
def nvcc_version() -> str:
    out = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", out)
    return found[1] if found else "unknown"


@functools.cache
def archs() -> tuple[str, ...]:
    out = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout
    return ("sm_80", "sm_90", "sm_90a", *(["sm_100"] if "sm_100\n" in out else []))


def flags() -> list[str]:
    from_ptx = ",".join(arch for arch in archs() if arch != "sm_90a")
    return [
        *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DFT_CUDA"),
        f"-gencode=arch=compute_80,code=[{from_ptx}]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Werror=all-warnings",
    ]


def read_with_includes(source: Path, seen: dict[Path, bytes]) -> None:
    """Adds a file and all of csrc that it includes to ``seen``."""
    if source in seen:
        return
    seen[source] = source.read_bytes()
    for name in re.findall(rb'^\s*#\s*include "([^"]+)"', seen[source], re.M):
        for folder in (ROOT / "csrc", source.parent):
            path = folder / name.decode()
            if path.exists():
                read_with_includes(path, seen)
                break


def content() -> str:
    """What the table depends on: the compiler, how it is called, every file that it reads."""
    seen: dict[Path, bytes] = {}
    for source in SOURCES:
        read_with_includes(source, seen)
    found = hashlib.sha256(" ".join([nvcc_version(), *flags()]).encode())
    for path in sorted(seen):
        found.update(f"{path.relative_to(ROOT)} {len(seen[path])}\n".encode() + seen[path])
    return found.hexdigest()


@functools.cache
def objects(only: str | None = None) -> dict[str, Path]:
    """Source → its object with the code of every architecture; ninja makes what changed."""
    options = [*flags(), f"-I{ROOT / 'csrc'}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    names = {str(s.relative_to(ROOT / "csrc/cuda")): s for s in SOURCES}
    made = {name: name.replace("/", ".")[:-3] + ".o" for name in names}
    lines = [
        "rule nvcc",
        f"  command = {NVCC} {' '.join(options)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {made[name]}: nvcc {names[name]}" for name in names),
        "",
    ]
    (BUILD / "build.ninja").write_text("\n".join(lines))
    wanted = {name: object for name, object in made.items() if only in (None, name)}
    ninja = [sys.executable, "-m", "ninja", "-C", str(BUILD), "-j", "2"]
    done = subprocess.run([*ninja, *wanted.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: BUILD / object for name, object in wanted.items()}


def dump(path: Path, arch: str, option: str) -> str:
    done = subprocess.run([str(tool("cuobjdump")), "-arch", arch, option, str(path)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_names(symbols: list[str]) -> dict[str, str]:
    """Mangled, of a kernel → short: softmax_held<bf16, 8>."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    short = {}
    for symbol, name in zip(symbols, text.stdout.splitlines()):
        if "(" not in name:
            continue  # no function
        name = re.sub(r"\(anonymous namespace\)::|ft::cuda::|^void |\(bool\)|\(int\)", "", name)
        short[symbol] = name[: name.rindex("(")].replace("float", "f32")
    return short


def threads_of(elf: str) -> dict[str, int]:
    """Kernel → the largest block that its launch bounds allow."""
    parts = re.split(r"^\.nv\.info\.(\w+)", elf, flags=re.M)
    found = {}
    for symbol, notes in zip(parts[1::2], parts[2::2]):
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) ", notes)
        if bound is not None:
            found[symbol] = int(bound[1], 16)
    return found


def resources_of(path: Path, arch: str) -> dict[str, dict[str, int]]:
    text = dump(path, arch, "--dump-resource-usage")
    use = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text))
    threads = threads_of(dump(path, arch, "-elf"))
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
            "threads": threads.get(symbol, 1024),
            **{what: count for what, count in counts.items() if count},
        }
    return rows


@functools.cache
def compiled(only: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture → kernel → registers, spills (bytes of stack), static shared memory, the largest
    block, code; of every source or of one."""
    table: dict[str, dict[str, dict[str, int]]] = {arch: {} for arch in archs()}
    jobs = [(path, arch) for path in objects(only).values() for arch in archs()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (_, arch), rows in zip(jobs, pool.map(lambda job: resources_of(*job), jobs)):
            table[arch] |= rows
    return table


def is_of_these_sources(table: dict) -> bool:
    return table["content"] == content()


if __name__ == "__main__":
    assert not missing(), missing()
    table: dict = {"nvcc": nvcc_version(), "content": content()}
    table |= {arch: dict(sorted(kernels.items())) for arch, kernels in compiled().items()}
    text = json.dumps(table, indent=1)
    one_line = re.compile(r"\{\s+(\"registers\".*?)\s+\}", re.S)  # a kernel's entry
    text = one_line.sub(lambda m: "{" + " ".join(m[1].split()) + "}", text)
    TABLE.write_text(text + "\n")
    print(f"wrote {TABLE}")
