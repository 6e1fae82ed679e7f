"""Builds the C++ (and, where asked for or possible, CUDA) libraries and the package around them.

ninja runs the build graph that `build_graph` writes. What can't be built is left out with a line
that says what is missing, what works without it and how to get it; the package then still runs on
its Triton and torch backends. Environment variables:

  FASTTRANSFORMER_NO_BUILD=1     no compiled code at all: a pure-Python package
  FASTTRANSFORMER_CUDA=1|0       build the CUDA library though torch has no CUDA / don't build it
  FASTTRANSFORMER_CUDA_ARCHS     default "80;90a"; PTX of the newest plain one is added
  CXX, NVCC, MAX_JOBS            compiler, CUDA compiler, parallel jobs
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Each CPU kernel file is compiled once per row; csrc/cpu/isa.cpp picks one at run time.
X86_ISAS = {
    "portable": ["-O2"],  # CPUs of before 2013: right comes first, and -O3 triples the build's time
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-mprefer-vector-width=512"],
}  # fmt: skip
# Compilers use AMX only where it is written; the kernels ask whether the CPU has it.
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
ISAS = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}

COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No -ffast-math: NaN, Inf and −0 keep their meaning. Contraction gives a*b+c one rounding.
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi",
          "-Wno-unused-function", "-Wno-ignored-attributes",
          "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # fmt: skip
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CUDA_ARCHS = os.environ.get("FASTTRANSFORMER_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")


def say(line: str) -> None:
    print(f"fasttransformer build: {line}", file=sys.stderr, flush=True)


def compiler_problem(compiler: str) -> str | None:
    """Why `compiler` can't build this package, or None."""
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found"
    out = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True).stdout
    major = int((re.match(r"\d+", version.strip()) or re.match("0", "0")).group())
    least = 15 if "clang" in out.lower() else 11
    if major < least:
        return f"{compiler} {version.strip()} is too old (GCC 11 or Clang 15 at least)"
    return None


def torch_problem() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed in the environment that builds (see README: Install)"
    parts = torch.__version__.split("+")[0].split(".")
    if (int(parts[0]), int(parts[1])) < (2, 11):
        return f"torch {torch.__version__} is too old (2.11 at least)"
    return None


def nvcc_problem() -> str | None:
    """Why the CUDA compiler can't build this package, or None."""
    nvcc = os.environ.get("NVCC", "nvcc")
    if shutil.which(nvcc) is None:
        return f"no CUDA compiler ({nvcc}) was found (put nvcc of the CUDA toolkit 12.4 or later on PATH, or its path in NVCC)"  # noqa: E501
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", out)
    if found is None:
        return f"{nvcc} --version says no version that is understood: {out.strip()[:200]!r}"
    version = (int(found[1]), int(found[2]))
    if version < (12, 4):
        return f"{nvcc} is of the CUDA toolkit {version[0]}.{version[1]}, which is too old (12.4 at least)"  # noqa: E501
    return None


def arch_problem(archs: list[str]) -> str | None:
    """Why nvcc can't compile for one of FASTTRANSFORMER_CUDA_ARCHS, or None."""
    nvcc = os.environ.get("NVCC", "nvcc")
    out = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\d+)", out)
    for arch in archs:
        form = re.fullmatch(r"(\d{2,3})[af]?", arch)
        if form is None:
            return f"FASTTRANSFORMER_CUDA_ARCHS: {arch!r} is not an architecture (write it like 80, 90a or 100f, with ; between)"  # noqa: E501
        if int(form[1]) < 80:
            return f"FASTTRANSFORMER_CUDA_ARCHS: {arch} is older than 80 (the kernels need bfloat16 and asynchronous copies; Triton may serve that GPU)"  # noqa: E501
        if known and form[1] not in known:
            return f"FASTTRANSFORMER_CUDA_ARCHS: this nvcc does not know {arch}; it knows {', '.join(known)}"  # noqa: E501
    return None


def wants_cuda() -> bool:
    """Whether the CUDA library is built; says why where it is not, stops where it was asked for."""
    asked = os.environ.get("FASTTRANSFORMER_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(
            f"fasttransformer build: FASTTRANSFORMER_CUDA is {asked!r}; it must be 0, 1 or unset"
        )
    if asked == "0":
        say("FASTTRANSFORMER_CUDA=0: the CUDA kernels are left out (CPU kernels and Triton work)")
        return False
    import torch

    has_cuda = torch.version.cuda is not None
    if asked == "" and not has_cuda:
        say("the installed torch has no CUDA: the CUDA kernels are left out (CPU kernels and "
            "Triton work; FASTTRANSFORMER_CUDA=1 builds them all the same)")  # fmt: skip
        return False
    problem = nvcc_problem() or arch_problem(CUDA_ARCHS)
    if problem is not None:
        if asked == "1":
            raise SystemExit(f"fasttransformer build: FASTTRANSFORMER_CUDA=1, but {problem}")
        say(f"{problem}: the CUDA kernels are left out. Triton serves the GPU; mend this and build "
            "again to have them")  # fmt: skip
        return False
    if not has_cuda:
        say("building the CUDA kernels though the installed torch has no CUDA: they load only "
            "where torch has")  # fmt: skip
    return True


def torch_paths() -> tuple[list[str], Path]:
    import torch

    base = Path(torch.__file__).resolve().parent
    return [str(base / "include"), str(base / "include/torch/csrc/api/include")], base / "lib"


def gencode(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    portable = [a for a in archs if a.isdigit()]
    if portable:  # PTX for GPUs that come later
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def nvcc_flags(archs: list[str]) -> list[str]:
    """What a .cu file is compiled with."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo",
             "-DFT_CUDA", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden",
             f"-I{CSRC}", *gencode(archs),
             f"-DFT_CUDA_ARCHS='\"{' '.join(archs)}\"'"]  # fmt: skip
    return [*flags, f"-ccbin={os.environ['CXX']}"] if "CXX" in os.environ else flags


def build_graph(library: str, output: Path, work: Path) -> str:
    """The ninja file for one library: "cpu" or "cuda"."""
    includes, torch_lib = torch_paths()
    flags = [*COMMON, f"-I{CSRC}", *[f"-isystem {p}" for p in includes]]
    own = os.environ.get("CXXFLAGS", "").split()  # the user's come last
    cuda = library == "cuda"
    defines = ["-DFT_CUDA", "-DUSE_CUDA"] if cuda else []
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"nvcc = {os.environ.get('NVCC', 'nvcc')}",
        "rule cxx",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule nvcc",
        "  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $linker -shared -o $out $in $flags",
        "  description = $out",
    ]
    objects: list[str] = []

    def compile_step(source: Path, name: str, step_flags: list[str], rule: str = "cxx") -> None:
        target = f"{work}/{name}.o"
        objects.append(target)
        if rule == "cxx":
            step_flags = [*step_flags, *own]
        lines.extend([f"build {target}: {rule} {source}", f"  flags = {' '.join(step_flags)}"])

    for source in sorted((CSRC / "bindings").glob("*.cpp")):
        if not (CSRC / library / f"{source.stem}.{'cu' if cuda else 'cpp'}").exists():
            continue  # the operation has no kernel there yet
        compile_step(source, f"bindings.{source.stem}", [*flags, *STABLE_ABI, *defines])
    if cuda:
        for source in sorted((CSRC / "cuda").glob("**/*.cu")):
            name = ".".join(source.relative_to(CSRC).with_suffix("").parts)
            compile_step(source, name, nvcc_flags(CUDA_ARCHS), "nvcc")
        # nvcc links, since it knows where its static CUDA runtime lies; -z defs leaves no symbol
        # that neither torch nor the system has.
        stub, directory = cuda_torch_library(torch_lib, work)
        lines.extend(stub)
        link = ["-cudart=static", "-Xlinker=--no-as-needed,-z,defs", f"-L{directory}",
                f"-L{torch_lib}", "-ltorch_cuda", "-ltorch_cpu", "-lpthread",
                "-ldl", "-lrt"]  # fmt: skip
    else:
        for name in ("registration.cpp", "cpu/isa.cpp", "cpu/parallel.cpp"):
            compile_step(CSRC / name, name.replace("/", ".")[:-4], [*flags, *STABLE_ABI])
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.stem in ("isa", "parallel"):
                continue
            for isa, isa_flags in ISAS.items():
                compile_step(source, f"cpu.{source.stem}.{isa}",
                             [*flags, *KERNEL, *isa_flags, f"-DFT_ISA={isa}"])  # fmt: skip
        link = [f"-L{torch_lib}", "-ltorch_cpu", *os.environ.get("LDFLAGS", "").split()]
    needs = f" | {work}/stub/libtorch_cuda.so" if cuda and stub else ""
    lines.append(f"build {output}: link {' '.join(objects)}{needs}")
    lines.append(f"  linker = {'$nvcc' if cuda else '$cxx'}")
    lines.append(f"  flags = {' '.join(link)}")
    return "\n".join(lines) + "\n"


def cuda_torch_library(torch_lib: Path, work: Path) -> tuple[list[str], Path]:
    """(build steps, directory) of the libtorch_cuda.so to link against.

    It holds the one symbol that libtorch_cpu lacks, the current CUDA stream. Under a torch without
    CUDA an empty library of that name stands in while linking; where the result is loaded, the name
    then finds torch's own, or the load fails with a message that says it is missing.
    """
    if (torch_lib / "libtorch_cuda.so").exists():
        return [], torch_lib
    folder = work / "stub"
    folder.mkdir(exist_ok=True)
    source = folder / "torch_cuda.cpp"
    source.write_text('extern "C" void aoti_torch_get_current_cuda_stream() {}\n')
    target = folder / "libtorch_cuda.so"
    steps = [
        "rule stub",
        "  command = $cxx -shared -fPIC -Wl,-soname,libtorch_cuda.so -o $out $in",
        f"build {target}: stub {source}",
    ]
    return steps, folder


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(build_graph(ext.name.rsplit("_", 1)[-1], output, work))
        command = [sys.executable, "-m", "ninja", "-C", str(work), "-f", "build.ninja"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


def extensions() -> list[Extension]:
    if os.environ.get("FASTTRANSFORMER_NO_BUILD") == "1":
        say("FASTTRANSFORMER_NO_BUILD=1: no compiled kernels; the Triton and torch backends work")
        return []
    problem = torch_problem() or compiler_problem(os.environ.get("CXX", "g++"))
    if problem:
        say(f"{problem}: the compiled kernels are left out. The Triton and torch backends work; "
            "mend this and install again with --no-build-isolation to have them")  # fmt: skip
        return []
    built = [Extension("fasttransformer._cpu", sources=[], py_limited_api=True)]
    if wants_cuda():
        built.append(Extension("fasttransformer._cuda", sources=[], py_limited_api=True))
    return built


EXTENSIONS = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
