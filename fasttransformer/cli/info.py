"""``fasttransformer info``: the machine, the backends, what is built, and how to get the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from .. import __version__
from .._libraries import cuda_library
from ..backends import NAMES, TABLE, backends
from ..benchmarks._shared import cpu_name
from ._output import command, console, escape, print_json, table

#: Instruction sets worth knowing of, as /proc/cpuinfo calls them.
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
            "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16",
            "sve")  # fmt: skip

_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def hint(backend: str, reason: str) -> str | None:
    """What to do to get a backend that is missing for ``reason``, or None."""
    if backend == "cpu" and "start it in another folder" in reason:
        return None
    if backend == "cpu" and "not built" in reason:
        return (
            "install a C++ compiler (GCC 11 or Clang 15, or later), leave FASTTRANSFORMER_NO_BUILD "
            f"unset, and in the source folder run: {_REBUILD}"
        )
    if backend == "cpu" and "load" in reason:
        return f"build it again for the torch that is installed, in the source folder: {_REBUILD}"
    if backend == "cuda" and "not built" in reason:
        if torch.version.cuda is None:
            return (
                "on a machine with an NVIDIA GPU, install the CUDA toolkit 12.4 or later (nvcc) "
                f"and a CUDA build of torch (this one, {torch.__version__}, has no CUDA); then, in "
                f"the source folder: {_REBUILD}"
            )
        return (
            f"install the CUDA toolkit 12.4 or later (nvcc); then, in the source folder: {_REBUILD}"
        )
    if backend == "cuda" and "holds code for" in reason:
        return (
            "build it for that GPU, in the source folder: FASTTRANSFORMER_CUDA_ARCHS=<its compute "
            f"capability without the point> {_REBUILD}"
        )
    if backend == "cuda" and "driver is of" in reason:
        return "install a newer NVIDIA driver, or build with an older CUDA toolkit (12.4 at least)"
    if backend == "triton" and "not installed" in reason:
        return "pip install triton (Linux)"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    return [feature for feature in FEATURES if feature in flags]
    except OSError:
        pass
    return []


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def gather() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain data."""
    found = backends()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    isa = torch.ops.fasttransformer.cpu_isa() if found["cpu"] is None else None
    return {
        "fasttransformer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": usable,
            "memory_bytes": _memory_bytes(),
            "features": _cpu_features(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ] if torch.cuda.is_available() else [],
        },
        "threads": torch.get_num_threads(),
        "instruction_set": isa,
        "cuda_library": cuda_library(),
        "backends": {
            name: {
                "available": reason is None,
                "reason": reason,
                "hint": None if reason is None else hint(name, reason),
            }
            for name, reason in found.items()
        },
        "operations": {
            op: [name for name in NAMES if name in row and found[name] is None]
            for op, row in TABLE.items()
        },
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith("FASTTRANSFORMER_")
            or name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        },
    }  # fmt: skip


def show(facts: dict[str, Any]) -> None:
    out = console()
    machine = facts["machine"]
    memory, isa = machine["memory_bytes"], facts["instruction_set"]
    rows = [
        ("fasttransformer", facts["fasttransformer"]),
        ("torch", f"{facts['torch']} (Python {facts['python']})"),
        ("triton", facts["triton"] or "not installed"),
        ("system", machine["system"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"
                + (f", {memory / 2**30:.0f} GiB" if memory else "")),
        ("CPU features", " ".join(machine["features"]) or "unknown"),
        ("CPU kernels", f"those for {isa}" if isa else "none, see Backends below"),
        ("threads", f"{facts['threads']} (torch.set_num_threads or OMP_NUM_THREADS changes it)"),
        ("GPU", ", ".join(machine["gpus"]) or "none that torch sees"),
    ]  # fmt: skip
    library = facts["cuda_library"]
    if library is not None:
        archs = " ".join(f"sm_{arch}" for arch in library["archs"].split())
        rows.append(("CUDA library", f"{archs}; nvcc {library['nvcc']}; "
                     f"{library['bytes'] / 2**20:.1f} MiB"))  # fmt: skip
    rows += [(name, value) for name, value in facts["environment"].items()]
    body = table()
    for row in rows:
        body.add_row(*map(escape, row))
    out.print(body)

    out.print("\n[bold]Backends[/]")
    body = table()
    for name, state in facts["backends"].items():
        if state["available"]:
            body.add_row(name, "[green]yes[/]", "")
        else:
            body.add_row(name, "[yellow]no[/]", escape(state["reason"]))
            if state["hint"]:
                body.add_row("", "", f"[dim]to get it: {escape(state['hint'])}[/]")
    out.print(body)

    out.print("\n[bold]Operations and the backends that can run them here[/]")
    out.print("[dim]`fasttransformer explain` says which of them runs a given call, and why[/]")
    body = table()
    for op, names in facts["operations"].items():
        body.add_row(op, ", ".join(names))
    out.print(body)


def run(args: argparse.Namespace) -> int:
    facts = gather()
    if args.json:
        print_json(facts)
    else:
        show(facts)
    return 0


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "info",
        "this machine, the backends, what is built here and how to get the rest",
        "  fasttransformer info\n"
        "  fasttransformer info --json | jq .backends\n",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)
