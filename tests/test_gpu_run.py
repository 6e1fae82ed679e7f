"""benchmarks/gpu_run.sh and its parts, as far as a machine without a GPU can test them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fasttransformer.benchmarks import (
    gpu,
    gpu_cases,
    gpu_check,
    gpu_prebuilt,
    gpu_probes,
    gpu_summary,
    record,
)
from fasttransformer.benchmarks._shared import OURS, Case, backward_of, forward_backward_of
from fasttransformer.benchmarks.clock import timing_of
from fasttransformer.cli.cases import CHECKS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STAGES = {
    "1": ["environment", "check-cuda", "check-triton", "probes", "tests", "bench"],
    "2": ["environment", "warm", "bench", "memory"],
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def call(*args, **environment):
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_run.sh"), *map(str, args)], capture_output=True, text=True,
        check=False, env=os.environ | environment,
    )  # fmt: skip


def stand_in(folder, body):
    """A python that only says how it was called, and does what ``body`` adds."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\necho "called $*"\ncase "$*" in\n{body}\nesac\n')
    python.chmod(0o755)
    return str(python)


#: The script's own programs are run by a real interpreter.
REAL = f'*gpu_jobs.py*|*gpu_summary.py*) exec "{sys.executable}" "$@" ;;'


def in_archive(out, name):
    with tarfile.open(out / "results.tar.gz") as archive:
        return archive.extractfile(f"./{name}").read().decode()


# ---- the script ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", STAGES)
def test_dry_run_names_every_stage_and_takes_four_minutes_at_most(tmp_path, run):
    python = stand_in(tmp_path, "")
    out = tmp_path / "out"
    done = call(out, "--run", run, "--dry-run", PYTHON=python)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "at most" in line]
    assert [line.split()[1] for line in lines[:-1]] == STAGES[run]
    limits = [int(line.split("at most ")[1].split()[0]) for line in lines[:-1]]
    assert sum(limits) <= 240 and lines[-1] == f"== {sum(limits)} s at most"
    assert "gpu --estimate --selection " + {"1": "short", "2": "full"}[run] in done.stdout
    assert not out.exists()
    only = call(out, "--dry-run", "--only", "tests", "--limit", "tests=7", PYTHON=python)
    assert only.stdout.splitlines() == ["== tests (at most 7 s)", "== 7 s at most"]


@pytest.mark.parametrize(
    "args",
    [(), ("{out}",), ("{out}", "--run", "3"), ("{out}", "--run", "1", "--nonsense"),
     ("{out}", "--only", "nonsense"), ("{out}", "--run", "1", "--limit", "tests"),
     ("{out}", "--run", "1", "--limit", "nonsense=3"), ("/dev/null/x", "--run", "1"),
     ("{out}", "--run", "1", "--prebuilt", "{out}/nowhere"), ("{out}", "--run"), ("--run", "1")],
)  # fmt: skip
def test_bad_use(tmp_path, args):
    done = call(*(a.format(out=tmp_path) for a in args))
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "gpu_run:" in done.stderr


def test_failing_and_hanging_stages_stop_none_and_lose_nothing(tmp_path):
    """Names are asked for by environment; one check fails, a probe hangs, the tests never end."""
    python = stand_in(
        tmp_path,
        f"""{REAL}
        *gpu_check\\ --list) echo softmax >"$work/gpu_check.names"; echo softmax; exit ;;
        *gpu_probes\\ --list) echo "quick slow"; exit ;;
        *gpu_check*cuda) echo '{{"started": "plain"}}'; exit 1 ;;
        *gpu_probes\\ quick*) echo '{{"probe": "quick", "status": "ok"}}' ;;
        *gpu_probes\\ slow*) echo '{{"probe": "half"}}'; sleep 60 ;;
        *-m\\ pytest*) echo '{{"outcome": "passed"}}' >"$work/tests.jsonl"; sleep 60 ;;
        *benchmarks.gpu\\ *) echo '{{"rows": []}}' >"$work/bench.json" ;;""",
    )
    out = tmp_path / "out"
    limits = ["--limit", "probes=2", "--limit", "tests=2"]
    done = call(out, "--run", "1", *limits, PYTHON=python, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    rows = [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == STAGES["1"]
    status = {row[0]: int(row[1]) for row in rows}
    assert status["check-cuda"] == 1 and status["tests"] == 124 and status["bench"] == 0
    assert status["probes"] != 0 and "called -m fasttransformer info" in in_archive(
        out, "environment.log"
    )
    assert '{"started": "plain"}' in in_archive(out, "check-cuda/softmax.jsonl")
    assert '"status": "ok"' in in_archive(out, "probes/quick.jsonl")
    assert '"probe": "half"' in in_archive(out, "probes/slow.jsonl")
    assert "slow\t124\t" in in_archive(out, "probes/jobs.tsv")
    assert in_archive(out, "tests.jsonl") == '{"outcome": "passed"}\n'
    assert sorted(p.name for p in out.iterdir()) == [
        "bench.json", "results.tar.gz", "stages.tsv", "summary.txt"
    ]  # fmt: skip
    assert "stopped at its limit" in (out / "summary.txt").read_text()
    assert done.stdout.rstrip().endswith((out / "summary.txt").read_text().rstrip())
    assert not list(tmp_path.glob("gpu_run.*"))
    calls = in_archive(out, "tests.log")
    assert "-m pytest tests -m gpu -n" in calls and "--results" in calls


def test_a_stopped_run_still_packs_what_it_has(tmp_path):
    python = stand_in(
        tmp_path, f'{REAL}\n*-m\\ pytest*) echo one >"$work/tests.jsonl"; sleep 60 ;;'
    )
    out = tmp_path / "out"
    run = subprocess.Popen(
        ["bash", str(BENCHMARKS / "gpu_run.sh"), str(out), "--only", "tests"],
        env=os.environ | {"PYTHON": python, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    while not list(tmp_path.glob("gpu_run.*/tests.jsonl")):
        assert run.poll() is None
    run.terminate()
    assert run.wait(20) == 143
    assert in_archive(out, "tests.jsonl") == "one\n"
    run.stdout.close()


def test_check_runs_one_process_for_each_operation(tmp_path):
    """Both backends, and the real list of operations."""
    ops = gpu_check.jobs()
    assert {name.partition(".")[0] for name in ops} == {case.op for case in CHECKS}
    assert len(set(ops)) == len(ops) and ops[0] == "attention.0"
    for backend, names in (("cuda", ops), ("triton", ops[:2])):
        python = stand_in(
            tmp_path,
            f'{REAL}\n*gpu_check\\ --list) printf "%s\\n" {" ".join(names)}; exit ;;',
        )
        out = tmp_path / backend
        assert call(out, "--only", f"check-{backend}", PYTHON=python).returncode == 0
        for op in names:
            said = in_archive(out, f"check-{backend}/{op}.jsonl")
            assert said == f"called -m fasttransformer.benchmarks.gpu_check {op} {backend}\n"


def test_compiling_for_triton_is_shared_out(tmp_path):
    python = stand_in(tmp_path, REAL)
    out = tmp_path / "out"
    assert call(out, "--only", "warm", PYTHON=python).returncode == 0
    called = "called -m fasttransformer.benchmarks.gpu --warm"
    for part in ("0of13", "12of13"):
        assert in_archive(out, f"warm/{part}.jsonl") == f"{called} {part}\n"


# ---- prebuilt libraries -------------------------------------------------------------------------


def library(folder, name, source, *options):
    path = folder / name
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path), *options],
        input=source, text=True, check=True,
    )  # fmt: skip
    return path


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("readelf") is None, reason="needs g++ and readelf"
)
def test_a_library_that_would_not_load_is_refused(tmp_path):
    plain = library(tmp_path, "_cpu.abi3.so", "int f() { return 1; }")
    assert gpu_prebuilt.problems(plain) == []
    python = 'extern "C" int PyLong_AsLong(void*); int f() { return PyLong_AsLong(0); }'
    bad = library(tmp_path, "_cuda.abi3.so", python)
    assert gpu_prebuilt.problems(bad) == ["needs symbols of Python: PyLong_AsLong"]
    assert gpu_prebuilt.check(tmp_path) == 1
    source = "#include <cstring>\nvoid f(void* a, void* b, size_t n) { memcpy(a, b, n); }"
    copies = library(tmp_path, "copies.so", source, "-fno-builtin")
    needed = gpu_prebuilt.versions(gpu_prebuilt.dynamic_symbols(copies))["GLIBC"]
    older = (*needed[:-1], needed[-1] - 1)
    [problem] = gpu_prebuilt.problems(copies, {**gpu_prebuilt.NEWEST, "GLIBC": older})
    assert problem.startswith(f"needs GLIBC {gpu_prebuilt.dotted(needed)}, newer than ")
    bad.unlink()
    assert gpu_prebuilt.check(tmp_path) == 1  # one is missing


def test_prebuilt_libraries_are_put_where_the_package_looks(tmp_path, capsys):
    source, package = tmp_path / "built", tmp_path / "package"
    source.mkdir()
    package.mkdir()
    assert gpu_prebuilt.install(source, package) == 1
    for name in gpu_prebuilt.LIBRARIES:
        (source / name).write_text(name)
    (package / "_cuda.abi3.so").write_text("another")
    assert gpu_prebuilt.install(source, package) == 1
    assert (package / "_cuda.abi3.so").read_text() == "another"
    assert (package / "_cpu.abi3.so").read_text() == "_cpu.abi3.so"
    said = capsys.readouterr().out
    assert "_cuda.abi3.so: left as it is" in said and "_cpu.abi3.so: copied" in said
    assert gpu_prebuilt.install(source, package, replace=True) == 0
    assert (package / "_cuda.abi3.so").read_text() == "_cuda.abi3.so"
    wheel = shutil.make_archive(str(tmp_path / "wheel"), "zip", tmp_path, "built")
    shutil.rmtree(package)
    package.mkdir()
    assert gpu_prebuilt.install(Path(wheel), package) == 0 and len(list(package.iterdir())) == 2


# ---- probes -------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """On a busy machine threads that wait for one another take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", gpu_probes.PROBES)
def test_every_probe_runs_on_the_cpu(name):
    found = gpu_probes.probe(name, "cpu", gpu_probes.stand_in_backend())
    assert found["status"] == "ok" and found["checks"] > 0, found
    json.dumps(found)


def test_a_probe_finds_what_is_wrong_and_what_raises(monkeypatch):
    def wrong(card):
        card.hold("softmax", lambda ops, x: ops.softmax(x).square(), card.randn(3, 8))
        card.hold("doubled", lambda ops, x: x * (2 if ops is gpu_probes.ft else 1), card.randn(3))
        card.equal("ones", torch.ones(2), torch.zeros(2))

    def raises(card):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_probes.PROBES, "wrong", wrong)
    monkeypatch.setitem(gpu_probes.PROBES, "raises", raises)
    found = gpu_probes.probe("wrong", "cpu", "torch")
    assert found["status"] == "finding" and found["findings"] == 3
    assert found["notes"][0].startswith("doubled, output 0: ")
    found = gpu_probes.probe("raises", "cpu", "torch")
    assert found["status"] == "finding" and "illegal" in found["notes"][0]


# ---- the benchmark ------------------------------------------------------------------------------


def test_cotangents_live_on_the_device_of_the_outputs():
    x = torch.randn(2, 3, device="meta", requires_grad=True)
    drawn = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            drawn.extend(t.device.type for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Spy():
        [grad] = backward_of(torch.exp, x)()
        assert grad.device.type == "meta" and forward_backward_of(torch.exp, x)()[0].is_meta
    assert set(drawn) == {"meta"}


def test_rows_of_the_gpu_benchmark_find_wrong_and_failing_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "measure", lambda function, device, ms: timing_of([1e-3]))
    candidates = {
        OURS: lambda: lambda: torch.randn(3),
        "same": lambda: lambda: torch.randn(3),  # drawn from the same seed
        "wrong": lambda: lambda: torch.zeros(3),
        "fails": lambda: 1 / 0,
        "known": lambda: pytest.fail("it failed in an earlier process"),
        "matmul alone": lambda: lambda: torch.zeros(3),
    }
    case = Case("softmax", "3", torch.float32, lambda: candidates, bytes=1000)
    limits = {"copy": (10.0, "GB/s"), "matmul bf16": (99.0, "GFLOP/s")}
    row = gpu.row(case, limits, known={"known": "hung"})
    assert {name for name, f in row.candidates.items() if f.wrong} == {"wrong", "fails", "known"}
    assert row.candidates["same"].speedup == 1.0 and row.candidates["matmul alone"].rate
    assert "ZeroDivisionError" in row.candidates["fails"].wrong
    run = record.Run({"gpu": "a card"}, rows=[row])
    record.save(run, tmp_path / "x.json")
    assert record.load(tmp_path / "x.json") == run and run.machine.startswith("a card")

    def broken(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(gpu, "_clean_up", broken)
    with pytest.raises(gpu.Broken) as error:
        gpu.row(case, limits)
    assert error.value.candidate == OURS


@pytest.mark.parametrize("selection", gpu_cases.SELECTIONS)
def test_attention_is_measured_first_and_each_case_once(selection):
    ids = [case.id for case in gpu_cases.SELECTIONS[selection](gpu_cases.CARD)]
    assert len(set(ids)) == len(ids)
    assert ids[:4] == [
        "attention 1×16×16384×128 bfloat16", "attention backward 1×16×16384×128 bfloat16",
        "attention 1×16×16384×128 causal bfloat16",
        "attention backward 1×16×16384×128 causal bfloat16",
    ]  # fmt: skip
    kinds = [name.split()[0].split("_")[0] for name in ids]
    firsts = [kinds.index(kind) for kind in ("attention", "softmax", "linear")]
    assert firsts == sorted(firsts)
    if selection == "full":
        grid = [name for name in ids if name.startswith(("attention 1×", "attention backward"))]
        assert all(any(f"×{d} " in name for name in grid) for d in (64, 128, 256))
        assert len(ids) > 100
    estimate = gpu_cases.plan(gpu_cases.SELECTIONS[selection](gpu_cases.CARD), 0.04)
    seconds = float(estimate.rpartition("estimate: ")[2].split()[0])
    assert seconds < {"short": 45, "full": 165}[selection]


def test_a_candidate_that_hangs_costs_only_itself(tmp_path, capfd):
    """The rehearsal's second case has one; its process is replaced and the run goes on."""
    results = tmp_path / "bench.json"
    name = "attention backward 1×16×256×128 bfloat16"
    assert gpu.main(["--rehearse", "--json", str(results), "--selection", "short", "--each", "4",
                     "--only", name, "--seconds", "100"]) == 0  # fmt: skip
    [row] = record.load(results).rows
    assert row.candidates["one that hangs"].wrong == "fails: no end after 4 s"
    assert row.ours.seconds and not list(tmp_path.glob("*.now"))
    assert gpu_summary.summary(tmp_path).startswith("== stages")


def test_the_gpu_benchmark_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2 and "no NVIDIA GPU" in capsys.readouterr().err


def test_summary_is_short_and_survives_files_that_are_cut(tmp_path):
    (tmp_path / "stages.tsv").write_text("probes\t124\t30\nbench\t0\t9\n")
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes/jobs.tsv").write_text("a\t0\t1.0\nb\t124\t9.0\nc\t-\t0\n")
    ok = {"status": "ok", "checks": 3, "worst": 0.5, "notes": []}
    (tmp_path / "probes/a.jsonl").write_text(json.dumps(ok) + '\n{"half')
    (tmp_path / "probes/b.jsonl").write_text('{"started": "b"}\n')
    results = [{"test": f"t{i}", "outcome": "failed", "said": "x" * 5000} for i in range(500)]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    (tmp_path / "bench.json").write_text('{"ceilings"')
    text = gpu_summary.summary(tmp_path)
    assert len(text) <= gpu_summary.MOST + 100
    assert "ok, 3 checks" in text and "no result: stopped at its limit" in text
    assert "not started: c" in text and "500 failed" in text and "and 485 more" in text
