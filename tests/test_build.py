"""What the build leaves behind: per-instruction-set objects that can't leak into each other."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = sorted(ROOT.glob("build/temp.*/fasttransformer._cpu/cpu.*.*.o"))


@pytest.mark.skipif(not OBJECTS, reason="no build directory beside the sources")
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_no_shared_weak_symbols():
    """A template of std:: or of ft:: itself that is compiled with AVX-512 flags is a weak symbol;
    the linker keeps one copy of each, which an older CPU would then run into."""
    leaks = []
    for path in OBJECTS:
        isa = path.name.split(".")[-2]
        out = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in out.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "WVu" and f"ft::{isa}::" not in name and not name.startswith("DW.ref."):
                leaks.append(f"{path.name}: {name}")
    assert not leaks, "\n".join(leaks[:20])
