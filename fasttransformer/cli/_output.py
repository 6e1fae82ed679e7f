"""What the commands share: how they print, how they parse shapes, and the error that is bad use."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .._arguments import not_one_of

__all__ = [
    "DTYPES",
    "UsageError",
    "command",
    "console",
    "device_of",
    "dtype_of",
    "escape",
    "positive",
    "print_json",
    "progress",
    "require",
    "shape_of",
    "table",
    "write_json",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


class UsageError(Exception):
    """Bad use of the command line: one line on stderr and exit status 2."""


def console(record: bool = False) -> Console:
    """stdout; 120 columns where it is no terminal, so that a log doesn't wrap."""
    return Console(
        width=None if sys.stdout.isatty() else 120, highlight=False, emoji=False, record=record
    )


def progress() -> Progress:
    """A bar on stderr while a command works; nothing where stderr is no terminal."""
    errors = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


def require(package: str, extra: str, option: str) -> None:
    """Says before any work is done that an option needs a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{option} needs {package}: pip install 'fasttransformer[{extra}]'")


def table(*columns: str, right: int | None = None) -> Table:
    """A plain table, with a head if columns are named; from column ``right`` on aligned right."""
    made = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if right is not None and i >= right else "left")
    return made


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def write_json(path: str, value: Any) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except OSError as error:
        raise UsageError(f"--json: {path} can't be written: {error.strerror}") from None


def shape_of(text: str) -> tuple[int, ...]:
    """An argparse type: "1,8,128,64" → (1, 8, 128, 64).

    >>> shape_of("1,8,128,64")
    (1, 8, 128, 64)
    """
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        shape = (-1,)
    if any(n < 0 for n in shape):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 1,8,128,64")
    return shape


def positive(text: str) -> int:
    """An argparse type: "3" → 3, and nothing below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def dtype_of(text: str) -> torch.dtype:
    """An argparse type: "bf16" or "bfloat16" → torch.bfloat16."""
    if text.removeprefix("torch.") not in DTYPES:
        raise argparse.ArgumentTypeError(not_one_of(text, DTYPES))
    return DTYPES[text.removeprefix("torch.")]


def device_of(text: str) -> str:
    """An argparse type: "cpu", "cuda:1", …, if torch knows it."""
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device like cpu or cuda:0") from None


def command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A sub-parser whose help ends with examples, the first line of each being the command."""
    made = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made
