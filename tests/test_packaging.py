"""The table of backends against the folders, and what a wheel, an sdist and an install hold."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fasttransformer import _checkout, _libraries, ops, reference
from fasttransformer.backends import ALIASES, COMPOSED, STEPS, TABLE, backends
from fasttransformer.cli import info

ROOT = Path(__file__).resolve().parent.parent

# ---- one name on every floor --------------------------------------------------------------------

#: floor → the file that an operation has there.
EVERY_OPERATION = {
    "front": "fasttransformer/ops/{op}.py",
    "reference": "fasttransformer/reference/{op}.py",
    "tests": "tests/test_{op}.py",
    "page": "docs/{op}.md",
}
BY_BACKEND = {
    "cpu": ("csrc/cpu/{op}.cpp", "csrc/params/{op}.h", "csrc/bindings/{op}.cpp"),
    "triton": ("kernels/{op}.py",),
    "cuda": ("csrc/cuda/{op}.cu", "csrc/params/{op}.h", "csrc/bindings/{op}.cpp"),
}
#: folder → files that belong to no single operation: (pattern of names, allowed beside operations).
SHARED = {
    "fasttransformer/ops/*.py": {"__init__"},
    "fasttransformer/reference/*.py": {"__init__", "dropout", "precision"},
    "kernels/*.py": {"__init__"},
    "csrc/bindings/*.cpp": {"ceilings", "find_outside"},
    "csrc/params/*.h": {"common", "philox", "row_norm", "ceilings", "find_outside"},
    "csrc/cpu/*.cpp": {"ceilings", "isa", "parallel", "gemm", "dot_product", "find_outside"},
    "csrc/cuda/*.cu": set(),
    "benchmarks/bench_*.py": {"models", "minilm"},
}
#: Operations whose C++ is that of another, called with other arguments.
SAME_KERNELS = {"attention_varlen": "attention", "attention_decode": "attention"}
OWN_KERNELS = {op: row for op, row in TABLE.items() if op not in COMPOSED}


def floors(op):
    yield from EVERY_OPERATION.values()
    for backend in OWN_KERNELS.get(op, ()):
        own = op if backend == "triton" else SAME_KERNELS.get(op, op)
        yield from (path.replace("{op}", own) for path in BY_BACKEND.get(backend, ()))
    if len(OWN_KERNELS.get(op, ())) > 1:
        yield "benchmarks/bench_{op}.py"


@pytest.mark.parametrize("op", TABLE)
def test_every_floor_of_an_operation_is_there(op):
    missing = [path for floor in floors(op) if not (ROOT / (path := floor.format(op=op))).exists()]
    assert not missing
    for name in [op, *(alias for alias, target in ALIASES.items() if target == op)]:
        assert callable(getattr(ops, name)) and name in ops.__all__
        assert callable(getattr(reference, name, None)) or op == "attention_decode"


@pytest.mark.parametrize("pattern", SHARED)
def test_no_file_without_an_operation(pattern):
    orphans = []
    for path in ROOT.glob(pattern):
        name = path.stem.removeprefix("bench_")
        of_operation = any(
            f"{name}_".startswith(f"{op}_") for op in (*TABLE, *STEPS)
        )  # foo, foo_backward
        if not of_operation and name not in SHARED[pattern] and not name.startswith("_"):
            orphans.append(path.name)
    assert not orphans


def test_every_operator_has_a_schema_in_one_place():
    text = (ROOT / "csrc/registration.cpp").read_text()
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', text))
    implemented = set()
    for path in (ROOT / "csrc/bindings").glob("*.cpp"):
        implemented |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
    assert implemented <= defined
    assert {op for op, row in OWN_KERNELS.items() if "cpu" in row} <= implemented


# ---- wheel, sdist, install ----------------------------------------------------------------------


def run(*command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, as a clone would have them."""
    copy = tmp_path_factory.mktemp("source") / "fasttransformer"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache",
        ".hypothesis", ".benchmarks", "demo-report",
    )  # fmt: skip
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def install(source, target, **environment):
    log = run(
        sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation",
        "--target", str(target), ".", cwd=source, **environment,
    )  # fmt: skip
    return log


def python(target, code, **environment):
    """Runs a line of Python that sees the installed copy before this one."""
    return run(
        sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target),
        FASTTRANSFORMER_BACKEND="", **environment,
    )  # fmt: skip


@pytest.mark.slow
def test_wheel_without_compiled_code(source, tmp_path):
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
        "-w", str(tmp_path), cwd=source, FASTTRANSFORMER_NO_BUILD="1",
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel),
        cwd=tmp_path)  # fmt: skip
    said = python(
        target,
        "import torch, fasttransformer as ft; print(ft.__file__);"
        "q = torch.randn(1, 2, 5, 8, requires_grad=True);"
        "ft.softmax(ft.attention(q, q, q, is_causal=True)).sum().backward();"
        "print(q.grad.shape, ft.explain('softmax', q).backend)",
    )
    assert str(target) in said and "torch.Size([1, 2, 5, 8]) torch" in said
    text = run(
        sys.executable, "-m", "fasttransformer", "info", "--json", cwd=target,
        PYTHONPATH=str(target),
    )  # fmt: skip
    facts = json.loads(text)
    assert facts["backends"]["torch"]["available"] and not facts["backends"]["cpu"]["available"]
    assert "not built" in facts["backends"]["cpu"]["reason"]
    assert "compiler" in facts["backends"]["cpu"]["hint"]


@pytest.mark.slow
def test_a_missing_compiler_is_told_and_does_not_stop_the_install(source, tmp_path):
    log = install(source, tmp_path / "site", CXX="/nonexistent/g++")
    assert "no C++ compiler (/nonexistent/g++) was found" in log
    assert "torch backends work" in log
    said = python(tmp_path / "site", "import fasttransformer as ft; print(ft.backends()['cpu'])")
    assert "was not built" in said


def test_sources_that_hide_an_installed_package_say_so(tmp_path, monkeypatch):
    """Python started in a clone after `pip install .` takes the sources, which have no kernels."""
    assert _checkout.shadows_installed() is None
    folder = tmp_path / "fasttransformer-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: fasttransformer\nVersion: 0.1.0\n")
    (tmp_path / "fasttransformer").mkdir()
    (tmp_path / "fasttransformer/_cpu.abi3.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert f"not the package installed in {tmp_path}" in _checkout.shadows_installed()
    monkeypatch.setattr(_libraries, "library_path", lambda name: tmp_path / "none.so")
    with pytest.warns(UserWarning, match="without its kernels: Python took the sources in"):
        reason = _libraries.load_cpu()
    assert "start it in another folder" in reason and info.hint("cpu", reason) is None


@pytest.mark.slow
def test_sdist_holds_the_kernels(source, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source,
        FASTTRANSFORMER_NO_BUILD="1")  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = [
        str(path.relative_to(ROOT))
        for folder, pattern in (("csrc", "**/*.*"), ("kernels", "*.py"), ("benchmarks", "*.py"))
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert not [name for name in wanted if name not in names]
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt"} <= names


@pytest.mark.slow
@pytest.mark.skipif(backends()["cpu"] is not None, reason="no compiled kernels here")
def test_wheel_serves_many_versions(tmp_path):
    # From this folder and not from a copy, so that ninja finds the objects that are there already.
    run(
        sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib"),
        "bdist_wheel", "--skip-build", "--bdist-dir", str(tmp_path / "bdist"),
        "--dist-dir", str(tmp_path), cwd=ROOT, FASTTRANSFORMER_CUDA="0",
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fasttransformer/_cpu.abi3.so",
        "fasttransformer/py.typed",
        "fasttransformer/kernels/softmax.py",
        "fasttransformer/benchmarks/_shared.py",
        "fasttransformer/cli/check.py",
        "fasttransformer/integrations/bert.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/"))]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fasttransformer").glob("**/*.py")}
    assert not modules - names, "a package is missing in pyproject.toml"
