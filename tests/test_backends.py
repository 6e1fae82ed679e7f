"""The table's rules about gradients: no row promises a backward that its backend does not have."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fasttransformer as ft
from fasttransformer import reference
from fasttransformer.backends import (
    COMPOSED,
    STEPS,
    TABLE,
    UNMEASURED,
    choose,
    decision,
    forced_backend,
    override,
    unavailable,
)

if ft.backends()["cpu"] is not None:
    pytest.skip("the C++ library is not built", allow_module_level=True)

JOINED = {
    "linear_add_layer_norm": ("add_layer_norm", "linear_add"),
    "linear_add_rms_norm": ("add_rms_norm", "linear_add"),
    "linear_softmax": ("softmax", "linear_add"),
}
#: A gradient goes to the reference, with a reason.
FORWARD_ONLY = {"linear_topk", "attention_decode"}


def inputs_of(op):
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(3, 5)]
    if op == "linear_softmax":
        return [t.requires_grad_() for t in tensors[:3]]
    tensors += [torch.randn(5) for _ in range(2 if op == "linear_add_layer_norm" else 1)]
    return [t.requires_grad_() for t in tensors]


@pytest.fixture
def without_backward():
    """Takes an operation's backward operator from the CPU row, as in an older library."""
    with contextlib.ExitStack() as overridden:

        def take(op):
            kernel = replace(TABLE[op]["cpu"], backward=None)
            overridden.enter_context(override("cpu", {op: kernel}))

        yield take


@pytest.mark.parametrize("op", [op for op in TABLE if op not in COMPOSED])
def test_every_kernel_has_a_backward_or_says_from_where(op):
    for name, kernel in TABLE[op].items():
        if name == "torch" or kernel.forward is None:
            continue
        assert kernel.backward_from == JOINED.get(op, ())
        assert (kernel.backward is None) == (op in JOINED or op in FORWARD_ONLY)
        reason = kernel.unsupported(torch.float32, frozenset({"grad"}), ())
        assert (reason is None) == (op not in FORWARD_ONLY)


@pytest.mark.parametrize(("op", "missing"), [(op, m) for op, ms in JOINED.items() for m in ms])
def test_a_gradient_joined_from_operators_that_are_not_there(without_backward, op, missing):
    without_backward(missing)
    inputs = inputs_of(op)
    function = getattr(ft, op)
    found = ft.explain(op, *inputs)
    assert found.backend == "torch"
    assert f"its backward needs that of {missing}, which is not there" in str(found)
    with pytest.raises(RuntimeError, match=f"its backward needs that of {missing}"):
        function(*inputs, backend="cpu")
    with torch.no_grad():
        assert ft.explain(op, *inputs).backend == "cpu"
    grads = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs)
    wants = torch.autograd.grad(getattr(reference, op)(*inputs)[0].square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, wants))


def test_a_kernel_whose_own_backward_is_not_there(without_backward):
    without_backward("softmax")
    x = torch.randn(3, 4, requires_grad=True)
    assert ft.explain("softmax", x.detach()).backend == "cpu"
    assert "has no backward kernel" in str(ft.explain("softmax", x))
    assert torch.autograd.grad(ft.softmax(x).square().sum(), x)[0].isfinite().all()


# ---- other kernels in the table's place ---------------------------------------------------------


def test_override_puts_a_kernel_in_and_takes_it_out():
    calls = []

    def forward(x, *options):
        calls.append(options)
        return x * 0

    before, x = TABLE["softmax"]["cpu"], torch.randn(3, 4)
    want = ft.softmax(x)  # the choice for these arguments is known from here on
    with override("cpu", {"softmax": replace(before, forward=forward)}):
        assert not ft.softmax(x).any() and len(calls) == 1
        assert torch.equal(ft.softmax(x, backend="torch"), torch.softmax(x, -1))
    assert TABLE["softmax"]["cpu"] is before
    assert torch.equal(ft.softmax(x), want) and len(calls) == 1


def test_override_makes_a_backend_available_on_a_type_of_device():
    kernel = replace(TABLE["softmax"]["cpu"], backend="cuda")
    x = torch.randn(3, 4)
    before = ft.backends()["cuda"]
    with override("cuda", {"softmax": kernel}, device_type="cpu"):
        assert unavailable("cuda") is None and ft.backends()["cuda"] is None
        assert choose("softmax", "cpu", x.dtype, backend="cuda") is kernel
        assert torch.equal(ft.softmax(x, backend="cuda"), ft.softmax(x))
        with override("cuda", {"softmax": replace(kernel, dtypes=())}):
            with pytest.raises(RuntimeError, match="dtype float32"):
                ft.softmax(x, backend="cuda")
        assert choose("softmax", "cpu", x.dtype, backend="cuda") is kernel
        assert choose("softmax", "cpu", x.dtype).backend == "cpu"  # the order stays what it is
    assert ft.backends()["cuda"] == before


def test_override_of_what_has_no_row():
    row = TABLE["merge_attention"]
    assert "triton" not in row
    with override("triton", {"merge_attention": replace(row["cpu"], backend="triton")}):
        assert "triton" in row
    assert "triton" not in row
    step = STEPS["activation"]["cpu"]
    with override("cpu", {"activation": replace(step, forward=None)}):
        assert STEPS["activation"]["cpu"].forward is None
    assert STEPS["activation"]["cpu"] is step
    for op in (*COMPOSED, "nonsense"):
        with pytest.raises(ValueError, match=f"override: '{op}' has no row"):
            with override("cpu", {op: step}):
                pass
    with pytest.raises(ValueError, match="'gpu' is not one of"):
        with override("gpu", {}):
            pass


def test_explain_says_that_cuda_before_triton_was_not_measured():
    cuda = replace(TABLE["attention"]["cpu"], backend="cuda")
    triton = replace(cuda, backend="triton")
    case = ("attention", "cuda", torch.bfloat16)
    with override("cuda", {"attention": cuda}, device_type="cuda"):
        with override("triton", {"attention": triton}, device_type="cuda"):
            found = decision(*case)
            assert found.backend == "cuda" and found.note == UNMEASURED["cuda"]
            assert str(found).endswith(f"note: {found.note}") and "prediction" in found.note
            assert decision(*case, forced="cuda").note == ""
            assert decision(*case, forced="triton").backend == "triton"
    assert ft.explain("softmax", torch.zeros(2, 3)).note == ""


@pytest.mark.parametrize("broken", ["triton", "fasttransformer.kernels"])
def test_a_part_that_can_not_be_imported_is_a_reason(broken):
    """The package imports, and says what is missing."""
    code = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {broken!r}:
            raise ImportError("made to fail")
sys.meta_path.insert(0, Broken())
import fasttransformer as ft, torch
assert "made to fail" in ft.backends()["triton"], ft.backends()
assert ft.softmax(torch.zeros(2, 2)).sum() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkout_that_is_only_on_the_path(tmp_path):
    """No install maps kernels/ and benchmarks/ into the package; the package does."""
    root = Path(__file__).resolve().parent.parent
    code = f"""
import sys
sys.path += {[p for p in sys.path if "site-packages" in p]!r}
import fasttransformer, fasttransformer.kernels.softmax, fasttransformer.benchmarks.record
print(fasttransformer.kernels.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "kernels/__init__.py"


# ---- threads ------------------------------------------------------------------------------------


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_f11_a_forced_backend_holds_for_its_thread():
    x = torch.zeros(2, 3)
    with ft.use_backend("torch"):
        assert ft.explain("softmax", x).backend == "torch"
        assert in_a_thread(lambda: ft.explain("softmax", x).backend) == "cpu"

        def nested():
            with ft.use_backend("cpu"):
                return ft.explain("softmax", x).backend

        assert in_a_thread(nested) == "cpu"
        assert ft.explain("softmax", x).backend == "torch"


def test_f11_blocks_that_end_in_another_order_than_they_began():
    """The thread whose block ended last put back the other one's backend, for good."""
    begun, ended = threading.Event(), threading.Event()
    x = torch.zeros(2, 3)

    def other():
        with ft.use_backend("torch"):
            begun.set()
            ended.wait(10)
        return forced_backend()

    with ThreadPoolExecutor(1) as pool:
        with ft.use_backend("cpu"):
            left = pool.submit(other)
            assert begun.wait(10)
        ended.set()
        assert left.result() is None
    assert forced_backend() is None and ft.explain("softmax", x).backend == "cpu"


def test_f11_explaining_in_one_thread_leaves_the_others_alone(monkeypatch):
    """Calls of other threads raised what only explain() catches."""
    x, results = torch.zeros(2, 3), []
    function = ft.ops.softmax

    def softmax(x):
        results.append(in_a_thread(lambda: function(x)))
        return function(x)

    monkeypatch.setattr(ft.ops, "softmax", softmax)
    assert ft.explain("softmax", x).backend == "cpu"
    assert torch.equal(results[0], torch.softmax(x, -1))


def test_f11_a_compiled_function_sees_the_backend_of_the_thread_that_calls_it():
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: ft.softmax(x).any().item(), backend="eager")
    zero = replace(TABLE["softmax"]["cpu"], forward=lambda x, *options: x * 0)
    with override("cpu", {"softmax": zero}):
        assert not compiled(x)
        with ft.use_backend("torch"):
            assert compiled(x)
            assert not in_a_thread(lambda: compiled(x))
            assert compiled(x)
        assert not compiled(x)

    def within(x):
        with ft.use_backend("torch"):
            return ft.softmax(x)

    out = torch.compile(within, backend="eager", fullgraph=True)(x)
    assert torch.equal(out, torch.softmax(x, -1)) and forced_backend() is None
