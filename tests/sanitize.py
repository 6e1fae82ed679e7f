"""The C++ kernels under the compiler's sanitizers: ``make sanitize``.

``address``: built with -fsanitize=address,undefined, so that reading or writing outside of a tensor
or of scratch memory, a misaligned access, an overflow of integers or a shift too far ends the run.
The tests of every operation on every instruction set of this CPU run, and random calls (fuzz.py).
``thread``: built with -fsanitize=thread, on plain threads instead of torch's pool (parallel.cpp):
two threads that touch one place without an order are reported. Every operation runs on four
threads, and in several Python threads at once (sanitize_threads.py).

The library is built under build/sanitize/NAME, beside links to the package's other files; what is
installed or built elsewhere stays as it is. The first build takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/sanitize"

FLAGS = {
    "address": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize-recover=undefined",
    "thread": "-O1 -g1 -fsanitize=thread",
}
#: What is loaded first into Python, which was not built for a sanitizer.
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python and torch free nothing at exit. Torch's own code is not instrumented.
    "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={ROOT / 'tests/tsan.supp'}",
}
#: Fails where Python does not take the library that was built for the sanitizer.
IS_USED = """
import sys
from fasttransformer import _libraries, backends
assert str(_libraries.library_path("cpu")).startswith(sys.argv[1]), _libraries.library_path("cpu")
assert backends()["cpu"] is None, backends()["cpu"]
"""


def missing(name: str) -> str | None:
    """Why nothing can be built for a sanitizer here, or None."""
    compiler = os.environ.get("CXX", "g++")
    for runtime in RUNTIMES[name]:
        try:
            found = runtime_of(compiler, runtime)
        except (OSError, subprocess.CalledProcessError):
            return f"no C++ compiler ({compiler})"
        if not Path(found).is_absolute():
            return f"{compiler} has no {runtime}"
    return None


def runtime_of(compiler: str, runtime: str) -> str:
    return subprocess.check_output([compiler, f"-print-file-name={runtime}"], text=True).strip()


def build(name: str) -> Path:
    """A folder with the package and its library built for a sanitizer."""
    folder = BUILD / name
    (folder / "fasttransformer").mkdir(parents=True, exist_ok=True)
    for link in folder.glob("fasttransformer/*"):
        if link.is_symlink():
            link.unlink()
    for path in (ROOT / "fasttransformer").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (folder / "fasttransformer" / path.name).symlink_to(path)
    for package in ("kernels", "benchmarks"):  # installed inside the package
        (folder / "fasttransformer" / package).symlink_to(ROOT / package)
    flags = {"CXXFLAGS": FLAGS[name], "LDFLAGS": f"{FLAGS[name]} -pthread"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}",
         f"--build-temp={folder / 'objects'}"],
        cwd=ROOT, check=True, env=os.environ | flags | {"FASTTRANSFORMER_CUDA": "0"},
    )  # fmt: skip
    return folder


def environment(name: str, folder: Path) -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    preload = [runtime_of(compiler, r) for r in (*RUNTIMES[name], "libstdc++.so.6")]
    return os.environ | OPTIONS | {
        "LD_PRELOAD": ":".join(preload),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]),
        "PYTHONMALLOC": "malloc",
        "OMP_WAIT_POLICY": "passive",
        "PYTEST_ADDOPTS": "",
    }  # fmt: skip


def programs(name: str, minutes: float) -> list[list[str]]:
    if name == "thread":
        return [["tests/sanitize_threads.py"]]
    tests = ROOT / "tests"
    operations = [path.stem for path in (ROOT / "fasttransformer/reference").glob("*.py")]
    files = {tests / f"test_{op}.py" for op in operations} | {*tests.glob("test_attention_*.py")}
    files.add(tests / "test_layouts.py")
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpu:"]
    return [
        [*pytest, *sorted(str(path) for path in files if path.exists())],
        ["tests/fuzz.py", "--minutes", str(minutes)],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", help="address, thread; default: both")
    parser.add_argument("--minutes", type=float, default=5.0, help="of random calls; default 5")
    given = parser.parse_args()
    for name in given.names or FLAGS:
        if name not in FLAGS:
            parser.error(f"no sanitizer {name!r}; there are {', '.join(FLAGS)}")
        if problem := missing(name):
            print(f"{name}: {problem}", file=sys.stderr)
            return 2
        print(f"{name}: building under {BUILD / name}", flush=True)
        folder = build(name)
        for program in [["-c", IS_USED, str(folder)], *programs(name, given.minutes)]:
            done = subprocess.run([sys.executable, *program], cwd=ROOT,
                                  env=environment(name, folder))  # fmt: skip
            if done.returncode != 0:
                print(f"{name}: {' '.join(program[:3])} ended with {done.returncode}")
                return 1
        print(f"{name}: nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
