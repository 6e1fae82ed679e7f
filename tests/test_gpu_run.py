"""benchmarks/gpu_run.sh and the GPU benchmark, as far as a machine without a GPU can test them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fasttransformer.benchmarks import gpu, record
from fasttransformer.benchmarks._shared import OURS, Case
from fasttransformer.benchmarks.clock import timing_of

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/gpu_run.sh"
STAGES = ["environment", "build", "check", "tests", "bench"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def call(*args, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def test_dry_run_names_every_stage_with_its_limit_in_ten_minutes(tmp_path):
    done = call(tmp_path, "--dry-run")
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [line.split()[1] for line in lines] == STAGES
    assert sum(int(line.split("at most ")[1].split()[0]) for line in lines) <= 610
    assert list(tmp_path.iterdir()) == []
    only = call(tmp_path, "--dry-run", "--only", "compiled")
    assert "--compile" in only.stdout and only.stdout.count("== ") == 1


@pytest.mark.parametrize("args", [(), ("{out}", "--nonsense"), ("{out}", "--only", "nonsense"),
                                  ("/dev/null/x",)])  # fmt: skip
def test_bad_use(tmp_path, args):
    done = call(*(a.format(out=tmp_path) for a in args))
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "gpu_run" in done.stderr


def test_a_stage_that_fails_stops_none_of_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "called $*"\n[[ "$*" != *check* ]]\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = call(out, PYTHON=str(python))
    assert done.returncode == 1 and "== check: exit status 1" in done.stdout
    rows = [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == STAGES
    assert dict((row[0], row[1]) for row in rows if row[0] != "environment") == {
        "build": "0", "check": "1", "tests": "0", "bench": "0"
    }  # fmt: skip
    assert "called -m pytest" in (out / "tests.log").read_text()


def test_rows_of_the_gpu_benchmark_find_wrong_and_failing_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "measure", lambda function: timing_of([1e-3]))
    candidates = {
        OURS: lambda: lambda: torch.randn(3),
        "same": lambda: lambda: torch.randn(3),  # drawn from the same seed
        "wrong": lambda: lambda: torch.zeros(3),
        "fails": lambda: 1 / 0,
        "matmul alone": lambda: lambda: torch.zeros(3),
    }
    case = Case("softmax", "3", torch.float32, lambda: candidates, bytes=1000, device="cuda")
    row = gpu.row(case, {"copy": (10.0, "GB/s"), "matmul bf16": (99.0, "GFLOP/s")})
    assert {name for name, f in row.candidates.items() if f.wrong} == {"wrong", "fails"}
    assert row.candidates["same"].speedup == 1.0 and row.candidates["matmul alone"].rate
    assert "ZeroDivisionError" in row.candidates["fails"].wrong
    run = record.Run({"gpu": "a card"}, rows=[row])
    record.save(run, tmp_path / "x.json")
    assert record.load(tmp_path / "x.json") == run and run.machine.startswith("a card")


def test_cases_of_the_gpu_benchmark_are_named_once(capsys):
    ids = [case.id for case in gpu.cases()]
    assert len(set(ids)) == len(ids) > 100
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2 and "no NVIDIA GPU" in capsys.readouterr().err
