"""Compiled libraries that were built on another machine: what they need, and where they go.

    python benchmarks/gpu_prebuilt.py check DIR             # what they need of a system
    python benchmarks/gpu_prebuilt.py load DIR              # load them into this Python's torch
    python benchmarks/gpu_prebuilt.py install DIR_OR_WHEEL  # copy them into this checkout

``check`` refuses what would not load on the GPU's machine or could not travel there: a version of
glibc or libstdc++ that is newer than Ubuntu 22.04 has, a symbol of Python (the libraries serve
every Python), more than 60 MB. It reads the dynamic symbols with readelf, which comes with a
compiler. ``install`` never replaces a library of the checkout that differs, unless --replace asks
for it. The file imports nothing but the standard library, so that it runs before the package can.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("_cpu.abi3.so", "_cuda.abi3.so")
#: The newest versions that a library may ask for: those of glibc 2.34 (2021) and GCC 12.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
MOST_BYTES = 60_000_000
#: An operator of each library, and the dispatch key that has it.
OPERATORS = {"_cpu.abi3.so": "CPU", "_cuda.abi3.so": "CUDA"}


def versions(symbols: str) -> dict[str, tuple[int, ...]]:
    """The newest version of each library that the undefined symbols of ``readelf`` ask for.

    >>> versions("7: 0 0 FUNC GLOBAL DEFAULT UND memcpy@GLIBC_2.14 (3)")
    {'GLIBC': (2, 14)}
    """
    newest: dict[str, tuple[int, ...]] = {}
    for name, digits in re.findall(r"\bUND\b.*@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols):
        version = tuple(map(int, digits.split(".")))
        newest[name] = max(newest.get(name, ()), version)
    return newest


def dynamic_symbols(library: Path) -> str:
    command = ["readelf", "--dyn-syms", "--wide", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def problems(library: Path, newest: dict[str, tuple[int, ...]] = NEWEST) -> list[str]:
    """Why a library would not load on the GPU's machine, or not get there."""
    symbols = dynamic_symbols(library)
    found = [
        f"needs {name} {dotted(version)}, newer than {dotted(newest[name])}"
        for name, version in versions(symbols).items()
        if version > newest[name]
    ]
    python = sorted(set(re.findall(r"\bUND (_?Py[A-Z_]\w*)", symbols)))
    if python:
        found.append(f"needs symbols of Python: {', '.join(python[:5])}")
    if (size := library.stat().st_size) > MOST_BYTES:
        found.append(f"has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}")
    return found


def check(folder: Path) -> int:
    bad = 0
    for name in LIBRARIES:
        library = folder / name
        if not library.exists():
            print(f"{name}: not there")
            bad += 1
            continue
        needs = ", ".join(f"{n} {dotted(v)}" for n, v in versions(dynamic_symbols(library)).items())
        print(f"{name}: {library.stat().st_size / 1e6:.1f} MB, needs {needs or 'no glibc'}")
        for problem in problems(library):
            print(f"{name}: {problem}")
            bad += 1
    return 1 if bad else 0


def load(folder: Path) -> int:
    """Loads both as the package does; a device is not needed for that."""
    import torch

    for name, key in OPERATORS.items():
        try:
            torch.ops.load_library(folder / name)
        except OSError as error:
            print(f"{name}: does not load under torch {torch.__version__}: {error}")
            return 1
        if not torch._C._dispatch_has_kernel_for_dispatch_key("fasttransformer::softmax", key):
            print(f"{name}: loads under torch {torch.__version__}, but has no operators")
            return 1
    print(f"both load under torch {torch.__version__} and have their operators")
    return 0


def install(source: Path, package: Path = ROOT / "fasttransformer", replace: bool = False) -> int:
    """Copies the libraries of a folder or a wheel into the package's folder."""
    if source.is_file():
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(source) as wheel:
                for name in wheel.namelist():
                    if Path(name).name in LIBRARIES:
                        (Path(folder) / Path(name).name).write_bytes(wheel.read(name))
            return install(Path(folder), package, replace)
    found = [name for name in LIBRARIES if (source / name).exists()]
    if not found:
        print(f"{source}: has neither {' nor '.join(LIBRARIES)}", file=sys.stderr)
        return 1
    refused = 0
    for name in found:
        target = package / name
        if target.exists() and target.read_bytes() == (source / name).read_bytes():
            print(f"{name}: the same is there already")
            continue
        if target.exists() and not replace:
            newer = target.stat().st_mtime > (source / name).stat().st_mtime
            print(
                f"{name}: left as it is: another one{', a newer one,' if newer else ''} is there "
                "already (--replace takes the prebuilt one)"
            )
            refused += 1
            continue
        # Whole or not at all, and a new file: a process that has the old one open keeps it.
        beside = target.with_name(f".{name}.new")
        shutil.copyfile(source / name, beside)
        beside.replace(target)
        print(f"{name}: copied")
    return 1 if refused else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("check", "load", "install"))
    parser.add_argument("source", type=Path, metavar="DIR_OR_WHEEL")
    parser.add_argument("--replace", action="store_true", help="install over a different library")
    args = parser.parse_args(argv)
    if not args.source.exists():
        parser.error(f"{args.source} does not exist")
    if args.what == "install":
        return install(args.source, replace=args.replace)
    return {"check": check, "load": load}[args.what](args.source.resolve())


if __name__ == "__main__":
    raise SystemExit(main())
