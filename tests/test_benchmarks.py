"""The benchmark suite's own parts: the clock, agreement of candidates, the JSON schema, comparing,
the report, memory over length. Nothing here judges a time."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch

from fasttransformer.benchmarks import (
    agreement,
    clock,
    compare,
    memory,
    peers,
    readme,
    record,
    report,
)
from fasttransformer.benchmarks import runner as cases_runner
from fasttransformer.benchmarks._shared import OURS, REFERENCE, Case, candidates
from fasttransformer.cli import bench
from fasttransformer.cli import main as run

# ---- cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", bench.operations())
def test_every_operation_has_cases_that_count_bytes_and_flops(op):
    module = importlib.import_module(f"fasttransformer.benchmarks.bench_{op}")
    quick, full = module.cases(quick=True), module.cases(quick=False)
    assert 0 < len(quick) <= len(full)
    for case in quick + full:
        assert case.bytes > 0 and case.flops > 0, case.id
        assert case.unit == ("GB/s" if case.memory_bound else "GFLOP/s")
    for found in (quick, full):
        assert len({case.id for case in found}) == len(found)


@pytest.mark.parametrize("op", ["softmax", "layer_norm", "linear_add", "cross_entropy"])
def test_candidates_of_quick_cases_agree_with_the_reference(op):
    module = importlib.import_module(f"fasttransformer.benchmarks.bench_{op}")
    for case in module.cases(quick=True)[:6]:
        made = case.make()
        assert next(iter(made)) == OURS and REFERENCE in made
        assert OURS not in agreement.disagreements(case, made), case.id


def test_pytest_finds_the_bench_files_of_the_folder():
    """`pytest benchmarks/` by itself collects only what is called test_*.py."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/", "--collect-only", "-q",
         "--ignore-glob=*/bench_[!r]*"],
        cwd=readme.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    for op in ("rms_norm", "rotary_embedding"):
        assert f"bench_{op}.py" in found.stdout, found.stdout + found.stderr


def test_every_missing_peer_has_a_reason():
    for name, why in peers.available().items():
        assert why is None or len(why) > 5, name
    assert peers.available()["torch eager"] is None
    if not torch.cuda.is_available():
        assert peers.available()["Liger"] == "needs a GPU"


def test_onnxruntimes_operators_compute_the_same():
    if not peers.usable("onnxruntime"):
        assert peers.onnx_softmax(torch.ones(2, 2)) is None
        return
    x, w, b = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    torch.testing.assert_close(peers.onnx_softmax(x)()[0], torch.softmax(x, -1))
    want = torch.nn.functional.layer_norm(2 * x + 1, (8,), w, b)
    normed, summed = peers.onnx_add_layer_norm(x, x + 1, w, b, 1e-5)()
    torch.testing.assert_close(normed[0], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(summed[0], 2 * x + 1)
    q, k, v = (torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3))
    for causal in (False, True):
        got = peers.onnx_attention(q, k, v, causal)()
        torch.testing.assert_close(got, peers.eager_attention(q, k, v, causal))
    assert peers.onnx_softmax(x.bfloat16()) is None


# ---- agreement ----------------------------------------------------------------------------------


def case_of(functions, dtype=torch.float32, **options):
    return Case("softmax", "4×4", dtype, lambda: functions, bytes=128, flops=100, **options)


def row_of_one_visit(case):
    measurement = cases_runner.Measurement(case)
    measurement.visit(0.01)
    return measurement.row()


def test_a_wrong_peer_is_found_and_not_timed():
    x = torch.randn(4, 4)
    functions = candidates(
        {OURS: lambda x: torch.softmax(x, -1), "right": lambda x: torch.softmax(x.double(), -1),
         "wrong": lambda x: torch.softmax(x, 0), "fails": lambda x: 1 / 0},
        [x], "forward", lambda x: torch.softmax(x, -1),
    )  # fmt: skip
    functions |= {"integers": lambda: torch.ones(4, 4, dtype=torch.int64)}
    case = case_of(functions)
    wrong = agreement.disagreements(case, functions)
    assert set(wrong) == {"wrong", "fails", "integers"}
    assert wrong["fails"] == "fails: ZeroDivisionError: division by zero"
    row = row_of_one_visit(case)
    assert row.candidates["right"].speedup > 0
    assert row.candidates["wrong"].seconds is None and "differs" in row.candidates["wrong"].wrong
    assert agreement.disagreements(case_of(functions, compared=False), functions) == {
        "fails": wrong["fails"]
    }


def test_ours_is_held_to_the_reference_and_timed_all_the_same():
    functions = {OURS: lambda: torch.ones(3), REFERENCE: lambda: torch.zeros(3)}
    row = row_of_one_visit(case_of(functions))
    assert row.ours.wrong is not None and row.ours.seconds > 0
    assert REFERENCE not in row.candidates


def test_difference_of_special_values_shapes_and_16_bits():
    inf, nan = float("inf"), float("nan")
    same = torch.tensor([1.0, inf, nan, -inf])
    assert agreement.difference(same, same.clone(), torch.float32) is None
    other = torch.tensor([1.0, -inf, nan, -inf])
    assert "infinities" in agreement.difference(same, other, torch.float32)
    assert "infinities" in agreement.difference(torch.ones(1), torch.tensor([nan]), torch.float32)
    assert "shape" in agreement.difference(torch.ones(2), torch.ones(3), torch.float32)
    close = torch.ones(4) * 1.01
    assert agreement.difference(close, torch.ones(4), torch.bfloat16) is None
    assert agreement.difference(close, torch.ones(4), torch.float32) is not None
    assert agreement.difference({"a": (same,)}, [same], torch.float32) is None


def test_a_row_is_of_all_visits(monkeypatch):
    """A neighbour that slows a whole visit widens the spread, and does not move the ratio."""
    functions = {OURS: lambda: torch.ones(3), "peer": lambda: torch.ones(3)}
    slowness = iter([1.0, 1.0, 2.0])

    def turns_of(timed, seconds, **options):
        times = next(slowness)
        return {name: clock.timing_of([times, times]) for name in timed}

    monkeypatch.setattr(cases_runner, "time_in_turns", turns_of)
    measurement = cases_runner.Measurement(case_of(functions))
    assert not measurement.started
    for _ in range(3):
        measurement.visit(0.01)
    row = measurement.row()
    assert (row.ours.seconds, row.ours.high, row.ours.turns) == (1.0, 1.75, 6)
    assert row.candidates["peer"].speedup_high == 1.0


# ---- the clock ----------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its memory")
def test_freed_memory_goes_back_between_cases():
    """A whole grid's freed blocks once filled 24 GB."""
    code = """
import torch
from fasttransformer.benchmarks import _shared, memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

_shared.keep_allocations()
memory.KEPT_BYTES = 0
blocks = [torch.ones(1 << 20) for _ in range(100)]
last = torch.ones(1 << 20)  # above them on the heap
del blocks
before = resident()
memory.hand_back()
print(before - resident())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(found.stdout) > 200, found.stdout + found.stderr


def test_ratios_are_taken_turn_by_turn():
    slow_machine = [1.0, 10.0, 1.0]
    ours = clock.timing_of(slow_machine)
    peer = clock.timing_of([2 * t for t in slow_machine])
    ratio = clock.speedup(ours, peer)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_cold_cases_flush_before_each_call(monkeypatch):
    order = []
    monkeypatch.setattr(clock, "FLUSHED", 1 << 12)
    monkeypatch.setattr(clock._Cold, "__call__", lambda self: order.append("flush"))
    clock.time_in_turns({"a": lambda: order.append("a")}, 0.001, cold=True, turns=3)
    assert order[-6:] == ["flush", "a"] * 3


def test_a_warm_turn_begins_with_an_untimed_call(monkeypatch):
    order = []
    monkeypatch.setattr(clock, "_sample", lambda f, calls, device: order.append(calls) or 1e-3)
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    clock.time_in_turns(functions, 0.005, turns=2, sample=2e-3)
    assert order[4:] == ["a", 2, "b", 2, "b", 2, "a", 2]


# ---- records and comparing ----------------------------------------------------------------------


def run_of(*times, unit_cost=1000, **environment):
    """A run with a row per (case, seconds, spread)."""
    made = record.Run({"cpu": "a", "threads": 2, "torch": "2", **environment}, complete=True)
    made.ceilings = {"float32 FMA": (100.0, "GFLOP/s"), "copy 1 MiB": (50.0, "GB/s")}
    for name, seconds, spread in times:
        case = Case("softmax", name, torch.float32, dict, bytes=unit_cost, flops=unit_cost,
                    along=("curve", float(len(name))))  # fmt: skip
        ours = clock.Timing(seconds, seconds * (1 - spread), seconds * (1 + spread), (seconds,))
        peer = clock.timing_of([2 * seconds])
        made.rows.append(
            record.row_of(case, {OURS: ours, "torch": peer}, {"x<y": "bad & worse"}, ("copy", 5.0))
        )
    return made


def test_a_run_survives_its_file(tmp_path):
    made = run_of(("a", 1e-3, 0.01), ("bb", 2e-3, 0.02))
    made.memory = [record.Memory("attention", OURS, 512, 1 << 20)]
    file = tmp_path / "run.json"
    record.save(made, file)
    assert record.load(file) == made
    assert json.loads(file.read_text())["schema"] == record.SCHEMA
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]  # nothing half-written beside it


@pytest.mark.parametrize("text, said", [
    ("{", "is not JSON"), ("[]", "has no schema"),
    ('{"schema": 99}', "has schema 99; this version"),
    ('{"schema": 1}', "is not a benchmark of schema 1"),
])  # fmt: skip
def test_files_that_are_no_runs(tmp_path, text, said, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="x.json " + said):
        record.load(file)
    assert run(["bench", "--compare", str(file), str(file)]) == 2
    assert said in capsys.readouterr().err


def test_compare_takes_noise_into_account():
    old = run_of(("quiet", 1.0, 0.01), ("noisy", 1.0, 0.2), ("gone", 1.0, 0.0), ("same", 1.0, 0.0))
    new = run_of(("quiet", 1.2, 0.01), ("noisy", 1.2, 0.2), ("new", 1.0, 0.0), ("same", 1.02, 0.0))
    found = {c.row.case: c for c in compare.changes(old, new)}
    assert found["quiet"].slower and not found["noisy"].slower and not found["same"].slower
    assert {c.row.case for c in compare.changes(new, old) if c.faster} == {"quiet"}
    assert compare.only_in(old, new) == ["softmax gone float32"]
    assert compare.other_surroundings(old, run_of(cpu="b")) == {"cpu": ("a", "b")}


def test_compare_command(tmp_path, capsys):
    for name, seconds in (("old", 1.0), ("new", 2.0)):
        record.save(run_of(("a", seconds, 0.01), cpu=name), tmp_path / f"{name}.json")
    files = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert run(["bench", "--compare", *files]) == 0
    said = capsys.readouterr().out
    assert "1 slower" in said and "2.00" in said and "another cpu: old → new" in said
    record.save(run_of(("b", 1.0, 0.01)), files[1])
    assert run(["bench", "--compare", *files]) == 2
    assert "no case in common" in capsys.readouterr().err


# ---- report -------------------------------------------------------------------------------------


def test_the_report_is_one_page_with_pictures_and_tables(tmp_path):
    made = run_of(("a", 1e-3, 0.01), ("bb", 2e-3, 0.02))
    made.peers = {"Liger": "needs a GPU"}
    made.memory = [record.Memory("attention", OURS, n, n << 10) for n in (512, 1024)]
    for row in made.rows:
        row.op = "attention"
    files = {path.name for path in report.write(made, tmp_path / "out")}
    pictures = {"ratios.png", "roofline.png", "memory.png", "attention.png"}
    assert files == {"index.html", "results.json", "results.md", *pictures}
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert "x&lt;y" in page and "bad &amp; worse" in page and "needs a GPU" in page
    assert "| a, float32 |" in (tmp_path / "out/results.md").read_text()
    report.write(run_of(), tmp_path / "empty")  # a run cut short before its first row
    assert (tmp_path / "empty/index.html").exists()


def test_unwritable_places_are_found_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda *a: pytest.fail("measured first"))
    file = tmp_path / "file"
    file.write_text("")
    for option, where in (("--json", file / "x.json"), ("--report", file / "out"),
                          ("--json", tmp_path)):  # fmt: skip
        assert run(["bench", "--quick", option, str(where)]) == 2
        assert option in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    calls = []

    def times_of(timed, seconds, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(timed)
        return {name: clock.timing_of([1.0]) for name in timed}

    monkeypatch.setattr(cases_runner, "time_in_turns", times_of)
    monkeypatch.setattr(cases_runner, "machine_ceilings", dict)
    monkeypatch.setattr(bench, "keep_allocations", lambda: False)
    file = tmp_path / "cut.json"
    assert run(["bench", "--quick", "softmax", "--json", str(file)]) == 130
    kept = record.load(file)
    assert not kept.complete and len(kept.rows) == 1
    assert "what was measured is kept" in capsys.readouterr().out


def test_a_file_does_not_say_where_it_lay():
    said = record.command_line("bench", "softmax", "--json", "/a/b.json", "--report=/c")
    assert said == "bench softmax --json FILE --report=DIR"
    for file in readme.RESULTS.glob("*.json"):
        assert not re.search(r'["= ]/\w', file.read_text(encoding="utf-8")), file


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory can be read on Linux only")
def test_memory_of_attention_grows_with_length_and_not_its_square():
    """Over two doublings, in processes of their own: four times as much is linear."""
    found = {(m.op, m.candidate, m.length): m.bytes for m in memory.measured(True)}
    grown = {
        name: found["attention", name, 2048] / found["attention", name, 512]
        for name in (OURS, "torch eager")
    }
    assert grown[OURS] < 6.0 < grown["torch eager"]


# ---- results ------------------------------------------------------------------------------------


def test_tables_in_the_pages_are_what_the_results_say(tmp_path, monkeypatch, capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out
    text = (readme.ROOT / "README.md").read_text()
    assert "<!-- numbers: minilm" in text
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", ("README.md",))
    changed = re.sub(r"\| 1 × 16 \| float32 \| [\d.]+ ms", "| 1 × 16 | float32 | 1.0 ms", text)
    (tmp_path / "README.md").write_text(changed)
    assert readme.main(["--check"]) == 1 and "README.md" in capsys.readouterr().out
    assert readme.main([]) == 0 and (tmp_path / "README.md").read_text() == text


def test_results_are_of_this_schema_or_of_another_command():
    for path in sorted(readme.RESULTS.glob("*.json")):
        if path.name.split("-")[0] not in ("minilm", "overhead"):
            assert record.load(path).rows, path.name
    said = (readme.RESULTS / "README.md").read_text()
    for path in readme.RESULTS.glob("*.json"):
        assert path.name in said, f"{path.name} is not in results/README.md"
