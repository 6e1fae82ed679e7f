"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import fasttransformer.benchmarks
import fasttransformer.kernels


def modules() -> list[str]:
    # kernels and benchmarks are packages of their own in an editable install.
    found = ["fasttransformer"]
    for package in (fasttransformer, fasttransformer.kernels, fasttransformer.benchmarks):
        modules = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        found += [module.name for module in modules]
    ends = (".__main__", "._cpu", "._cuda", ".conftest")
    return sorted({name for name in found if not name.endswith(ends)})


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), report=False)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output"
