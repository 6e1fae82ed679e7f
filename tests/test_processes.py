"""What goes on around a call: forked children, several Python threads, thread counts that change,
and memory that must be given back."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from operation_cases import CASES as SMALL_CASES
from parallel_cases import CASES, results, same

from fasttransformer.backends import TABLE, backends

pytestmark = pytest.mark.skipif(backends()["cpu"] is not None, reason="no C++ library")


def close(a, b):
    return all((x - y).abs().max() < 1e-6 for x, y in zip(a, b, strict=True))


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_computes_and_ends():
    """pytorch/pytorch#17199: a child waits for ever for threads that only its parent has."""
    program = Path(__file__).with_name("parallel_cases.py")
    command = [sys.executable, str(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [line for line in run.stdout.split("\n") if line]
    assert run.returncode == 0, run.stdout + run.stderr
    assert lines == [f"{name} same" for name in ("operator", *CASES)]


@pytest.mark.parametrize("op", CASES)
def test_thread_counts(op, thread_count):
    """One, two and five threads, and another count in the backward pass than in the forward one:
    what a kernel keeps for each thread may not be counted twice."""
    equal = close if op == "attention_decode" else same  # its keys are split among the threads
    thread_count(1)
    expected = results(op)
    for forward, backward in ((2, 2), (5, 5), (1, 5), (5, 1)):
        thread_count(forward)
        assert equal(results(op, between=functools.partial(thread_count, backward)), expected)


def test_python_threads(thread_count):
    """Six threads that each go through all operations, every one starting at another."""
    thread_count(2)
    expected = {op: results(op) for op in CASES}
    names, wrong, start = list(CASES), [], threading.Barrier(6)

    def work(first: int) -> None:
        start.wait()
        for turn in range(len(names)):
            op = names[(first + turn) % len(names)]
            try:
                if not same(results(op), expected[op]):
                    wrong.append((op, "differs"))
            except Exception as error:
                wrong.append((op, repr(error)))

    workers = [threading.Thread(target=work, args=(3 * i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of the same name; ``uordblks`` are the bytes that are allocated."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated() -> int:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Mallinfo2
    return function().uordblks


#: operation → its first case, which is small; of linear_add the one with an activation.
SMALL = {case.op: case for case in reversed(SMALL_CASES) if case.op in TABLE}
SMALL["linear_add"] = next(case for case in SMALL_CASES if case.id == "linear_add: rows, gelu")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2 in this libc")
@pytest.mark.parametrize("op", TABLE)
def test_no_leak(op):
    """A call leaves nothing behind: one leaked object a call would be 16 bytes or more."""
    case = SMALL[op]
    tensors = case.tensors(case.n)
    for path, x in tensors.items():
        x.requires_grad_(x.is_floating_point() and case.wants_grad(path, "cpu"))

    def call() -> None:
        for path, x in tensors.items():
            if case.arguments[path].kind == "lengths" and case.arguments[path].written:
                x.zero_()  # room to append once more
        outs = [out for out in case.call(tensors, case.n) if out.requires_grad]
        if outs:
            sum(out.sum() for out in outs).backward()

    def growth_per_call(calls: int) -> float:
        gc.collect()
        before = allocated()
        for _ in range(calls):
            call()
        gc.collect()
        return (allocated() - before) / calls

    growth_per_call(50)
    # A leak is in every round; a table of Python's that grows once is in one.
    assert min(growth_per_call(400) for _ in range(3)) < 4
