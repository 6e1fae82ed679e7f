"""The instruction sets of the CPU kernels that this process can run, and what keeps the test suite
green where there are fewer of them.

As a plugin of pytest it leaves only the tests that depend on the sets, which ``test_cpu_isa.py``
runs under every value of FASTTRANSFORMER_CPU_ISA below the CPU's own set.
"""

from __future__ import annotations

import functools
import inspect
import re

import pytest

from fasttransformer._contract import ISAS, runnable

#: The sets that this CPU has and FASTTRANSFORMER_CPU_ISA does not hide; the last one is in use.
SETS = [name.removeprefix("cpu:") for name in runnable() if name.startswith("cpu:")]

#: torch's own libraries as on a CPU whose best set is this one.
TORCH_ENVIRONMENT = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}

#: A test whose source has one of these words chooses a set by itself. ("cpu:portable" is wherever
#: there is a C++ library, and asks for that.)
WORDS = re.compile(r"cpu_isa|\b(ISAS|SETS)\b|cpu:(\{|avx|amx)")


def parameters_of(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def named_sets(item: pytest.Item) -> dict[str, str]:
    """The instruction sets that a test's parameters name: {parameter: set}."""
    given = parameters_of(item).items()
    names = {k: v.removeprefix("cpu:") for k, v in given if isinstance(v, str)}
    return {parameter: name for parameter, name in names.items() if name in ISAS}


def asking_for_absent_sets(items: list[pytest.Item]) -> dict[pytest.Item, str]:
    """The tests that are parametrized over an instruction set that can't run here, and what to say.

    On a machine that has every set such a test passes, and on the others it fails. A test of what
    happens where a set is absent loops over ``ISAS`` instead.
    """
    return {
        item: f"{item.nodeid}: {parameter} names {name}, which can't run here"
        for item in items
        for parameter, name in named_sets(item).items()
        if name not in SETS
    }


def refuse_absent_sets(items: list[pytest.Item]) -> None:
    """Makes an error of each test in :func:`asking_for_absent_sets`."""
    for item, why in asking_for_absent_sets(items).items():
        item.setup = functools.partial(pytest.fail, why, pytrace=False)


def chooses_sets(item: pytest.Item) -> bool:
    """Whether a test chooses sets itself, in its parameters or in its source."""
    if named_sets(item).keys() - {"on"}:
        return True
    source = inspect.getsource(item.function) if isinstance(item, pytest.Function) else ""
    return WORDS.search(source) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves one case of each test that chooses sets and one of each file, on the best set."""
    absent = asking_for_absent_sets(items)
    if absent:
        raise pytest.UsageError("\n".join(absent.values()))
    kept, dropped, seen = [], [], set()
    for item in items:
        names, chooses = named_sets(item), chooses_sets(item)
        group = item.nodeid.partition("[")[0] if chooses else item.path
        if names:
            keep = SETS[-1] in names.values()
        else:
            keep = chooses and "on" not in parameters_of(item)
        if keep and group not in seen:
            seen |= {group, item.path}
            kept.append(item)
        else:
            dropped.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
