"""The instruction sets of the CPU kernels that this process can run, and what keeps the test suite
green where there are fewer of them.

As a plugin of pytest it leaves only the tests that depend on the sets, which ``test_cpu_isa.py``
runs under every value of FASTTRANSFORMER_CPU_ISA below the CPU's own set.
"""

from __future__ import annotations

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

#: A test whose source has one of these words chooses a set by itself.
WORDS = re.compile(rf"cpu_isa|\b(ISAS|SETS)\b|cpu:(\{{|{'|'.join(ISAS)})")


def named_sets(item: pytest.Item) -> dict[str, str]:
    """The instruction sets that a test's parameters name: {parameter: set}."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    names = {k: v.removeprefix("cpu:") for k, v in parameters.items() if isinstance(v, str)}
    return {parameter: name for parameter, name in names.items() if name in ISAS}


def refuse_absent_sets(items: list[pytest.Item]) -> None:
    """Stops the run if a test is parametrized over an instruction set that can't run here.

    On a machine that has every set such a test passes, and on the others it fails. A test of what
    happens where a set is absent loops over ``ISAS`` instead.
    """
    found = [
        f"{item.nodeid}: {parameter} names {name}, which can't run here"
        for item in items
        for parameter, name in named_sets(item).items()
        if name not in SETS
    ]
    if found:
        raise pytest.UsageError("\n".join(found))


def chooses_sets(item: pytest.Item) -> bool:
    """Whether a test chooses sets itself, in its parameters or in its source."""
    if named_sets(item).keys() - {"on"}:
        return True
    source = inspect.getsource(item.function) if isinstance(item, pytest.Function) else ""
    return WORDS.search(source) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests that choose sets. Of those that run on each backend, ``on``, one case on the
    best set is left, and one of each file whatever its source says."""
    refuse_absent_sets(items)
    kept, dropped, seen = [], [], set()
    for item in items:
        keep = chooses_sets(item)
        if "on" in getattr(getattr(item, "callspec", None), "params", {}):
            group = (item.path, item.function) if keep else item.path
            keep = named_sets(item).get("on") == SETS[-1] and group not in seen
            seen.update([group, item.path] if keep else [])
        (kept if keep else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
