"""Builds csrc/simt and the CUDA kernels for it, and makes them a backend that tests can run.

The kernels of csrc/cuda and their bindings are compiled by the C++ compiler with FT_SIMT; their
operators come into the namespace ``fasttransformer_simt`` with the schemas of ``fasttransformer``.
ninja builds them under build/simt, what changed only.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_objects
import launches
import torch

from fasttransformer.backends import COMPOSED, STEPS, TABLE, backends, override, use_backend

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


@dataclasses.dataclass(frozen=True)
class Card:
    """What limits a launch: whose code runs (tests/cuda_resources.json has its registers and static
    shared memory), bytes of shared memory that a block can have, multiprocessors, blocks."""

    arch: str
    shared: int
    multiprocessors: int
    grid: int = 2147483647


CARDS = {
    "sm_80": Card("sm_80", 163 * 1024, 108),  # A100
    "sm_86": Card("sm_80", 99 * 1024, 84),  # A40, RTX 3090; it runs the code for sm_80
    "sm_90": Card("sm_90a", 227 * 1024, 132),  # H100, H200
}
#: The least shared memory of sm_80 and later, an A100's multiprocessors; ``--card`` has others.
DEFAULT_CARD = Card("sm_80", 99 * 1024, 108)
GRID = DEFAULT_CARD.grid


def missing() -> str | None:
    """Why the simt library can't be built here, or None."""
    if shutil.which(CXX) is None:
        return f"no C++ compiler ({CXX})"
    if backends()["cpu"] is not None:
        return f"it needs the operators' schemas: {backends()['cpu']}"
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


def opened(path: Path) -> ctypes.CDLL:
    """A library that :func:`build` made, with its launches counted."""
    library = ctypes.CDLL(str(path))
    launches.watch(str(path), "simt")
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    path = build()
    definitions = torch.library.Library("fasttransformer_simt", "DEF")
    _library.definitions = definitions  # type: ignore[attr-defined]  # alive as long as the operators
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "fasttransformer":
            schema = str(getattr(torch.ops.fasttransformer, op).default._schema)
            definitions.define(schema.removeprefix("fasttransformer::"))
    torch.ops.load_library(path)
    library = opened(path)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    library.ft_simt_set_workers(max(1, (os.cpu_count() or 1) // workers))
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Builds and loads the library; its operators are torch.ops.fasttransformer_simt."""
    library = _library()
    put(_Current.card)
    return library


@functools.cache
def kernels() -> dict[str, int]:
    """Each kernel's name in tests/cuda_resources.json → where it lies in the library."""
    listing = subprocess.run(["nm", "--defined-only", str(build())], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    at = {}
    for line in listing.stdout.splitlines():
        offset, kind, symbol = line.split()
        if kind in "tTwW":
            at[symbol] = int(offset, 16)
    names = cuda_objects.kernel_names([symbol for symbol in at if symbol.startswith("_ZN2ft4cuda")])
    known = {name for name in json.loads(cuda_objects.TABLE.read_text())["sm_80"]}
    return {name: at[symbol] for symbol, name in names.items() if name in known}


class _Current:
    """The card that stands in the library now."""

    card: Card = DEFAULT_CARD
    arch: str | None = None


def put(card: Card) -> Card:
    """Makes simt stand for a card; gives the one before."""
    library, before = _library(), _Current.card
    if card.arch != _Current.arch:
        table = json.loads(cuda_objects.TABLE.read_text())[card.arch]
        for name, offset in kernels().items():
            use = table[name]
            library.ft_simt_set_resources(
                ctypes.c_int64(offset),
                ctypes.c_int64(use["shared"]),
                use["registers"],
                use["threads"],
            )
        _Current.arch = card.arch
    library.ft_simt_set_limits(
        ctypes.c_int64(card.grid), ctypes.c_int64(card.shared), ctypes.c_int(card.multiprocessors)
    )
    _Current.card = card
    return before


def put_by_default(card: Card) -> None:
    """The card of every test that asks for no other."""
    _Current.card = card


@contextlib.contextmanager
def limits(card: Card | None = None, **changes: Any) -> Iterator[None]:
    """Another card, or the one that stands with some of its limits (``grid``, ``shared``,
    ``multiprocessors``) changed."""
    load()
    card = card or _Current.card
    if changes.get("shared", card.shared) <= CARDS["sm_86"].shared:
        changes["arch"] = CARDS["sm_86"].arch  # no card with so little runs Hopper's code
    before = put(dataclasses.replace(card, **changes))
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def launch_only() -> Iterator[None]:
    """Launches are held to the card's limits and not carried out: for tests of very many sizes."""
    library = load()
    library.ft_simt_set_launch_only(1)
    try:
        yield
    finally:
        library.ft_simt_set_launch_only(0)


def operator(name: str) -> object | None:
    """The operator of that name, if the CUDA sources implement it."""
    load()
    if not torch._C._dispatch_has_kernel(f"fasttransformer_simt::{name}"):
        return None  # no operator of that name at all: its gradients are joined from others'
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttransformer_simt::{name}", "CPU"):
        return None
    return getattr(torch.ops.fasttransformer_simt, name).default


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Within it, the backend "cuda" is forced, runs on CPU tensors, and is simt."""
    load()
    rows = {op: row["cuda"] for op, row in (*TABLE.items(), *STEPS.items()) if "cuda" in row}
    emulated = {
        op: dataclasses.replace(kernel, forward=operator(op), backward=operator(f"{op}_backward"))
        for op, kernel in rows.items()
        if op not in COMPOSED
    }
    with override("cuda", emulated, device_type="cpu"), use_backend("cuda"):
        yield
