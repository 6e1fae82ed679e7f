"""Makes ``fasttransformer.kernels`` and ``fasttransformer.benchmarks`` importable in a checkout.

Their folders lie at the top of the repository and packaging maps them into the package, so an
installed package has them already. In a checkout that is only on ``PYTHONPATH`` (a machine where
nothing may be installed) this finder maps them instead. It is asked last, after the ones that know
installed packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {f"fasttransformer.{name}": ROOT / name for name in ("kernels", "benchmarks")}


class CheckoutFinder:
    """Finds the two packages of :data:`FOLDERS` in the checkout that holds this file."""

    @staticmethod
    def find_spec(
        name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None or not (folder / "__init__.py").exists():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def shadows_installed() -> str | None:
    """What to do where Python took this checkout although a package with kernels is installed.

    Python puts the folder it is started in first, so in a clone the sources come before what
    ``pip install .`` made of them.
    """
    here = Path(__file__).resolve().parent
    if not (ROOT / "setup.py").exists():
        return None
    for found in importlib.metadata.distributions(name="fasttransformer"):
        folder = Path(str(found.locate_file("fasttransformer"))).resolve()
        if folder != here and (folder / "_cpu.abi3.so").exists():
            return (
                f"Python took the sources in {ROOT}, not the package installed in {folder.parent}: "
                "start it in another folder, or build these sources with `make build`"
            )
    return None


def install() -> None:
    """Adds the finder in a checkout (where setup.py lies next to the package), once."""
    if (ROOT / "setup.py").exists() and CheckoutFinder not in sys.meta_path:
        sys.meta_path.append(CheckoutFinder)
