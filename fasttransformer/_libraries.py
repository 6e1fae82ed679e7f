"""The libraries that kernels come in: loading each, and why one can't be loaded or used here.

Every function answers with a reason (text that a user can act on) or None. A part that is missing
or broken is a reason, never an exception: the package works with what is left.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from . import _checkout

_BUILD = "install with a C++ compiler and without FASTTRANSFORMER_NO_BUILD"


def library_path(name: str) -> Path:
    """Where the library "cpu" or "cuda" lies, if it was built."""
    return Path(__file__).with_name(f"_{name}.abi3.so")


def load_cpu() -> str | None:
    """Loads the C++ library, which defines the schemas of all operators."""
    path = library_path("cpu")
    if not path.exists():
        shadowing = _checkout.shadows_installed()
        if shadowing is not None:
            warnings.warn(f"fasttransformer without its kernels: {shadowing}", stacklevel=2)
        return f"the C++ library was not built ({shadowing or _BUILD})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ library does not load: {error.__cause__ or error}"
    return None


def load_cuda(cpu_problem: str | None, path: Path | None = None) -> str | None:
    """Loads the CUDA library where there is a CUDA device; starts nothing on the device."""
    path = path or library_path("cuda")
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if not path.exists():
        return "the CUDA library was not built (needs nvcc and a CUDA build of torch)"
    if cpu_problem is not None:
        return f"it needs the C++ library's schemas: {cpu_problem}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA library does not load: {error.__cause__ or error}"
    return None


@functools.cache
def gpu_problem(path: Path | None = None) -> str | None:
    """Why the CUDA library can't run on a GPU that is here.

    It is asked before the first call on a GPU and not at import, since the question starts CUDA,
    after which a process can't fork.
    """
    problem_of = ctypes.CDLL(str(path or library_path("cuda"))).ft_cuda_problem
    problem_of.restype = ctypes.c_char_p
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"GPU {device} ({torch.cuda.get_device_name(device)})"
        if major < 8:
            return f"{gpu} is of compute capability {major}.{minor}; the CUDA kernels need 8.0 or later"  # noqa: E501
        problem = problem_of(major, minor).decode()
        if problem:
            return f"{gpu}: {problem}"
    return None


def cuda_library(path: Path | None = None) -> dict[str, Any] | None:
    """What the CUDA library on disk was built for, whether or not it can be loaded here."""
    path = path or library_path("cuda")
    if not path.exists():
        return None
    marker = rb"fasttransformer CUDA library: archs ([^;]*); nvcc ([^;]*);"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(marker, content)
        archs, nvcc = (group.decode() for group in found.groups()) if found else ("unknown",) * 2
    return {"archs": archs, "nvcc": nvcc, "bytes": path.stat().st_size}


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load_triton() -> str | None:
    """Imports the Triton kernels, which defines their operators; compiles nothing."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    if not interpreted() and not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    try:
        importlib.import_module("fasttransformer.kernels")
    except Exception as error:  # a kernel file that this Triton can't take must not end the import
        return f"the Triton kernels can't be imported: {type(error).__name__}: {error}"
    return None
