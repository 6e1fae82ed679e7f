from __future__ import annotations
from typing import Any
from ._output import command


def run(args):
    return 0


def add_parser(commands: Any) -> None:
    parser = command(commands, "demo", "x", "")
    parser.set_defaults(run=run)
