"""Forked children, several Python threads, and thread counts that change: the same bits as ever."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from parallel_cases import CASES, results, same

from fasttransformer.backends import backends

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
