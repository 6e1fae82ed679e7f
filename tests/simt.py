"""Builds csrc/simt and the CUDA kernels for it, and makes them a backend that tests can run.

The kernels of csrc/cuda and their bindings are compiled by the C++ compiler with FT_SIMT; their
operators come into the namespace ``fasttransformer_simt`` with the schemas of ``fasttransformer``.
ninja builds them under build/simt, what changed only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# The module: `fasttransformer.backends` is a function of that name.
backends = importlib.import_module("fasttransformer.backends")

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/simt"
TORCH = Path(torch.__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec",
         "-DFT_SIMT", f"-I{CSRC}",
         f"-I{ROOT / 'docs'}", "-isystem", str(TORCH / "include"),
         "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Wextra",
         "-Wno-unknown-pragmas"]  # fmt: skip
if " fma " in Path("/proc/cpuinfo").read_text():
    FLAGS += ["-mfma", "-mavx2"]  # a·b + c is rounded once, as nvcc compiles it
OPS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
GRID, SHARED = 2147483647, 99 * 1024  # an sm_86's shared memory, the least of sm_80 and later
MULTIPROCESSORS = 108  # an A100's


def missing() -> str | None:
    """Why the simt library can't be built here, or None."""
    if shutil.which(CXX) is None:
        return f"no C++ compiler ({CXX})"
    if "cpu" in backends._unavailable:
        return f"it needs the operators' schemas: {backends._unavailable['cpu']}"
    return None


def build(name: str = "simt", kernels: tuple[Path, ...] = ()) -> Path:
    """The path of a library of simt with ``kernels``, or with all CUDA kernels and bindings."""
    sources = [*sorted((CSRC / "simt").glob("*.cpp")), *kernels]
    if not kernels:
        # An operation's instances may lie in a folder of its name; sm90 is Hopper's own, and
        # device/library.cu asks the CUDA driver.
        sources += [
            s
            for s in sorted((CSRC / "cuda").rglob("*.cu"))
            if s.parent.name not in ("sm90", "device")
        ]
        sources += [CSRC / f"bindings/{op}.cpp" for op in OPS]
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libft_simt.so"
    lines = [
        "rule compile",
        f"  command = {CXX} {' '.join(FLAGS)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared -o $out $in -L{TORCH / 'lib'} -ltorch_cpu -pthread",
    ]
    objects = [f"{source.parent.name}.{source.stem}.o" for source in sources]
    lines += [f"build {out}: compile {source}" for out, source in zip(objects, sources)]
    lines += [f"build libft_simt.so: link {' '.join(objects)}", ""]
    with open(folder / "lock", "w") as lock:  # one process builds, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)],
                              capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Builds and loads the library; its operators are torch.ops.fasttransformer_simt."""
    path = build()
    definitions = torch.library.Library("fasttransformer_simt", "DEF")
    load.definitions = definitions  # type: ignore[attr-defined]  # alive as long as the operators
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "fasttransformer":
            schema = str(getattr(torch.ops.fasttransformer, op).default._schema)
            definitions.define(schema.removeprefix("fasttransformer::"))
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    library.ft_simt_set_workers(max(1, (os.cpu_count() or 1) // workers))
    return library


def operator(name: str) -> object | None:
    """The operator of that name, if the CUDA sources implement it."""
    load()
    if not torch._C._dispatch_has_kernel(f"fasttransformer_simt::{name}"):
        return None  # no operator of that name at all: its gradients are joined from others'
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttransformer_simt::{name}", "CPU"):
        return None
    return getattr(torch.ops.fasttransformer_simt, name).default


@contextlib.contextmanager
def limits(
    *, grid: int = GRID, shared: int = SHARED, multiprocessors: int = MULTIPROCESSORS
) -> Iterator[None]:
    """Limits the blocks of a launch and the bytes of shared memory of a block, and says how many
    multiprocessors a kernel's rules shall reckon with."""
    library = load()

    def set_limits(grid: int, shared: int, multiprocessors: int) -> None:
        library.ft_simt_set_limits(
            ctypes.c_int64(grid), ctypes.c_int64(shared), ctypes.c_int(multiprocessors)
        )

    set_limits(grid, shared, multiprocessors)
    try:
        yield
    finally:
        set_limits(GRID, SHARED, MULTIPROCESSORS)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Within it, the backend "cuda" is forced, runs on CPU tensors, and is simt."""
    load()
    table = (*backends.TABLE.items(), *backends.STEPS.items())
    rows = [(op, row["cuda"]) for op, row in table if "cuda" in row]
    before = [(kernel, kernel.forward, kernel.backward) for _, kernel in rows]
    reason = backends._unavailable.pop("cuda", None)
    for op, kernel in rows:
        op = backends.COMPOSED.get(op, op)
        if op == "attention":
            object.__setattr__(kernel, "forward", torch.ops.fasttransformer.attention.default)
            object.__setattr__(kernel, "backward", operator("attention_backward"))
            continue
        object.__setattr__(kernel, "forward", operator(op))
        object.__setattr__(kernel, "backward", operator(f"{op}_backward"))
    backends.EMULATED.add("cuda")
    backends._chosen.clear()
    try:
        with backends.use_backend("cuda"):
            yield
    finally:
        for kernel, forward, backward in before:
            object.__setattr__(kernel, "forward", forward)
            object.__setattr__(kernel, "backward", backward)
        if reason is not None:
            backends._unavailable["cuda"] = reason
        backends.EMULATED.discard("cuda")
        backends._chosen.clear()
