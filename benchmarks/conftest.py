"""Hands the cases of a bench file, and each candidate's name, to its one test function."""

from __future__ import annotations

from typing import Any

import pytest

from fasttransformer.benchmarks._shared import REFERENCE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case, not only the quick ones")


def pytest_generate_tests(metafunc: Any) -> None:
    if "candidate" not in metafunc.fixturenames:
        return
    cases = metafunc.module.cases(quick=not metafunc.config.getoption("--full"))
    pairs = [(case, name) for case in cases for name in case.make() if name != REFERENCE]
    metafunc.parametrize(
        ("case", "candidate"), pairs, ids=[f"{case.id}-{name}" for case, name in pairs]
    )
