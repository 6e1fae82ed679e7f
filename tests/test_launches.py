"""The harness itself: a test that names an operation and runs another kernel than its fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import launches
import pytest
import simt
import torch

import contract
import fasttransformer as ft
from fasttransformer import reference
from fasttransformer._contract import device_of
from fasttransformer.backends import backends

ROOT = Path(__file__).resolve().parent.parent
needs_simt = pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))
needs_triton = pytest.mark.skipif(backends()["triton"] is not None, reason="no Triton")


@needs_simt
def test_launches_are_counted_by_name():
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    with launches.recorded() as launched, simt.running():
        ft.attention(q, q, q).sum().backward()
    assert launched.on("simt")["attention"] == 1
    assert {"attention_backward_dq", "attention_backward_dkdv"} <= {*launched.on("simt")}
    with launches.recorded() as launched:
        ft.attention(q, q, q).sum().backward()  # on the CPU's own kernels
    assert not launched.by_source


@needs_triton
def test_launches_of_triton_are_counted_by_their_operator():
    x = torch.randn(4, 40, device=device_of("triton"), requires_grad=True)
    with launches.recorded() as launched, ft.use_backend("triton"):
        ft.linear_add_layer_norm(x, torch.randn(8, 40).to(x), None, torch.randn(4, 8).to(x),
                                 torch.ones(8).to(x), None)[0].sum().backward()  # fmt: skip
    assert {"linear_add_layer_norm", "linear_add_backward", "add_layer_norm_backward"} <= {
        *launched.on("triton")
    }
    launched.require("triton", "linear_add_layer_norm", backward=True)


def test_a_launch_elsewhere_does_not_count():
    """simt, cuda and triton have kernels of the same names."""
    launched = launches.Launches()
    launched.by_source = Counter([("triton", "softmax")])
    launched.require("triton", "softmax", backward=False)
    for on in ("simt", "cuda"):
        with pytest.raises(
            AssertionError, match=f"no forward kernel of softmax was launched on {on}"
        ):
            launched.require(on, "softmax", backward=False)
        with pytest.raises(AssertionError, match=f"no kernel of softmax was launched on {on}"):
            launched.require_any(on, "softmax")


@pytest.mark.parametrize(
    ("names", "op", "forward", "backward"),
    (
        (("attention", "attention_merge"), "attention", True, False),
        (("attention_backward_dq",), "attention", False, True),
        (("attention",), "attention_varlen", True, False),
        (("attention",), "scaled_dot_product_attention", True, False),
        (("merge_attention",), "attention", False, False),
        (("linear_add_layer_norm",), "linear_add", False, False),
        (("linear_add", "activation"), "feed_forward", True, False),
        (("activation", "activation_backward"), "feed_forward", False, False),
        (("embedding_backward (tiles)",), "embedding", False, True),
        (("softmax",), "log_softmax", True, False),
        (("cross_entropy",), "linear_cross_entropy", False, False),
        (("add_layer_norm_backward",), "linear_add_layer_norm", False, True),
    ),
)
def test_whose_kernel_a_name_is(names, op, forward, backward):
    launched = launches.Launches()
    launched.by_source = Counter(("simt", name) for name in names)
    for is_backward, there in ((False, forward), (True, backward)):
        if is_backward and op in launches.NO_BACKWARD:
            continue
        if there:
            launched.require("simt", op, forward=not is_backward, backward=is_backward)
        else:
            with pytest.raises(AssertionError, match=f"kernel of {op} was launched on simt"):
                launched.require("simt", op, forward=not is_backward, backward=is_backward)
    if forward or backward:
        launched.require_any("simt", op)
    launched.require("cpu:avx2", op, backward=True)  # nothing is counted there


# ---- the fault of old ---------------------------------------------------------------------------


def attention_check(**options):
    q = torch.randn(1, 2, 40, 16)
    contract.check(ft.attention, reference.attention, [q, q, q], **options)


@needs_simt
@pytest.mark.parametrize("grads", [False, True])
def test_a_check_fails_when_the_wrong_kernel_runs(grads, monkeypatch):
    on = contract.On("simt", "attention")
    attention_check(on=on, grads=grads)
    plain = simt.operator
    wrong = torch.ops.fasttransformer.attention.default
    monkeypatch.setattr(simt, "operator", lambda op: wrong if op == "attention" else plain(op))
    # With gradients the backward kernels do run in simt, and that must not be enough.
    with pytest.raises(AssertionError, match=r"no (forward )?kernel of attention was launched"):
        attention_check(on=on, grads=grads)


@needs_simt
def test_running_on_fails_when_nothing_of_the_operation_is_launched():
    x = torch.randn(3, 5)
    with pytest.raises(AssertionError, match="no kernel of rms_norm was launched on simt"):
        with contract.running_on(contract.On("simt", "rms_norm")):
            ft.softmax(x)
    with pytest.raises(AssertionError, match="no kernel was launched on simt"):
        with contract.running_on("simt"):
            pass
    with contract.running_on("simt"):
        ft.softmax(x)
    with contract.running_on("simt", launched=False):
        ft.softmax(x[:0])
    with pytest.raises(AssertionError, match="said to launch nothing on simt, but launched"):
        with contract.running_on("simt", launched=False):
            ft.softmax(x)


TESTS = """
import contract, pytest, torch
import fasttransformer as ft

@pytest.mark.parametrize("on", [on for on in contract.backends_of("softmax") if on == "simt"])
@pytest.mark.parametrize("wrong", [False, True])
def test_named(wrong, on):
    with contract.running_on(contract.On(str(on), "")) if wrong else contract.running_on(on):
        (ft.rms_norm if wrong else ft.softmax)(torch.randn(2, 3), *([(3,)] if wrong else []))

@pytest.mark.parametrize("on", contract.backends_of("softmax"))
def test_of_nothing(on):
    pass

@pytest.mark.launches_nothing("it looks at shapes")
@pytest.mark.parametrize("on", contract.backends_of("softmax"))
def test_marked(on):
    pass
"""


@needs_simt
def test_a_test_that_names_an_operation_and_runs_another_fails(tmp_path):
    for name, text in (("test_named.py", TESTS), ("conftest.py", "from tests_conftest import *\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "tests_conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    results = tmp_path / "results.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider", "-p",
         "no:xdist", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path),
         "--all", "--results", str(results)],
        capture_output=True, text=True, cwd=tmp_path,
        env={**outside_pytest(), "PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    outcomes = {}
    for line in results.read_text().splitlines():
        found = json.loads(line)
        outcomes[found["test"].partition("::")[2]] = found["outcome"]
    assert outcomes["test_named[False-simt]"] == "passed", done.stdout
    assert outcomes["test_named[True-simt]"] == "failed"
    assert outcomes["test_of_nothing[simt]"] == "failed"
    assert outcomes["test_of_nothing[torch]"] == "passed"
    assert outcomes["test_marked[simt]"] == "passed"
    assert "no kernel of softmax was launched on simt" in done.stdout


def outside_pytest():
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}


# ---- what tests may touch -----------------------------------------------------------------------


def test_no_test_reaches_into_private_state_of_the_table():
    """`override` is there for it."""
    private = re.compile(r"\bbackends\._[a-z]|from fasttransformer\.backends import [^\n]*\b_[a-z]"
                         r"|object\.__setattr__")  # fmt: skip
    found = [
        f"{path.name}:{number}"
        for path in (ROOT / "tests").glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line) and path.name != Path(__file__).name
    ]
    assert not found
