"""Builds csrc/simt and the CUDA kernels for it, and makes them a backend that tests can run.

The kernels of csrc/cuda and their bindings are compiled by the C++ compiler with FT_SIMT; their
operators come into the namespace ``fasttransformer_simt`` with the schemas of ``fasttransformer``.
The build is kept under build/simt, by a hash of the sources.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from fasttransformer.backends import TABLE, Kernel, _chosen, _unavailable, use_backend

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH_INCLUDE = Path(torch.__file__).resolve().parent / "include"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec", "-DFT_SIMT", f"-I{CSRC}",
         "-isystem", str(TORCH_INCLUDE), "-DTORCH_TARGET_VERSION=0x020a000000000000",
         "-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip
if " fma " in Path("/proc/cpuinfo").read_text():
    FLAGS += ["-mfma", "-mavx2"]  # a·b + c is rounded once, as nvcc compiles it
OPS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
GRID, SHARED = 2147483647, 99 * 1024  # an sm_86's shared memory, the least of sm_80 and later


def missing() -> str | None:
    """Why the simt library can't be built here, or None."""
    if shutil.which(CXX) is None:
        return f"no C++ compiler ({CXX})"
    if "cpu" in _unavailable:
        return f"it needs the operators' schemas: {_unavailable['cpu']}"
    return None


def compile_library(extra_sources: tuple[Path, ...] = ()) -> Path:
    """The path of the shared library of simt, all CUDA kernels and their bindings."""
    sources = [*sorted((CSRC / "simt").glob("*.cpp")), *extra_sources]
    if not extra_sources:
        sources += [CSRC / f"cuda/{op}.cu" for op in OPS]
        sources += [CSRC / f"bindings/{op}.cpp" for op in OPS]
    digest = hashlib.sha256(" ".join([CXX, torch.__version__, *FLAGS]).encode())
    for folder in ("simt", "cuda", "params", "bindings"):
        for path in sorted((CSRC / folder).rglob("*.*")):
            digest.update(path.read_bytes())
    for path in extra_sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build/simt" / digest.hexdigest()[:16]
    library = folder / "libft_simt.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = f"{folder}/{source.parent.name}.{source.stem}.{os.getpid()}.o"
        command = [CXX, *FLAGS, "-x", "c++", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source}:\n{done.stderr}"
        return target

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    link = [CXX, "-shared", *objects, "-o", f"{library}.{os.getpid()}",
            f"-L{TORCH_INCLUDE.parent / 'lib'}", "-ltorch_cpu"]  # fmt: skip
    subprocess.run(link, check=True)
    os.replace(f"{library}.{os.getpid()}", library)  # whole, with other processes side by side
    for path in objects:
        os.unlink(path)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles (once) and loads the library; its operators are torch.ops.fasttransformer_simt."""
    library = compile_library()
    definitions = torch.library.Library("fasttransformer_simt", "DEF")
    load.definitions = definitions  # type: ignore[attr-defined]  # alive as long as the operators
    for op in OPS:
        for name in (op, f"{op}_backward"):
            schema = str(getattr(torch.ops.fasttransformer, name).default._schema)
            definitions.define(schema.removeprefix("fasttransformer::"))
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@contextlib.contextmanager
def running(op: str, *, grid: int = GRID, shared: int = SHARED) -> Iterator[None]:
    """Within it, ``backend="cpu"`` of ``op`` is the CUDA kernel in simt.

    ``grid`` limits the blocks of a launch, ``shared`` the bytes of shared memory of a block.
    """
    library = load()
    operators = torch.ops.fasttransformer_simt
    kernel = Kernel("cpu", forward=getattr(operators, op).default,
                    backward=getattr(operators, f"{op}_backward").default)  # fmt: skip
    row = TABLE[op]
    before = row["cpu"]
    row["cpu"] = kernel
    _chosen.clear()
    library.ft_simt_set_limits(ctypes.c_int64(grid), ctypes.c_int64(shared))
    try:
        with use_backend("cpu"):
            yield
    finally:
        row["cpu"] = before
        _chosen.clear()
        library.ft_simt_set_limits(ctypes.c_int64(GRID), ctypes.c_int64(SHARED))
