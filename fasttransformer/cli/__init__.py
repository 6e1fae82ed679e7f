"""The command line: ``fasttransformer info | explain | check | bench | demo | train …``.

Each command is a module of this package with ``add_parser(commands)`` and ``run(args)``, which
returns the exit status: 0, or 1 on a finding; bad use is 2, with one line that says what is wrong.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from .._arguments import Parser, not_one_of
from ..backends import NAMES
from . import bench, check, demo, evaluate, explain, info, texts, train
from ._output import UsageError

COMMANDS = (info, explain, check, bench, demo, train, evaluate, texts)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="fasttransformer",
        description="Fused Transformer kernels for PyTorch: what runs here, whether it is right, "
        "how fast it is.",
        epilog="`fasttransformer COMMAND --help` shows a command's options and examples.",
    )
    top.add_argument("--version", action="version", version=f"fasttransformer {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without ✓ gets a ?, not a traceback
            stream.reconfigure(errors="replace")
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_warn, args.command)
        return _run(args)


def _warn(command: str, message: Warning | str, *_: Any) -> None:
    """A line, where Python's own adds the file and the code that warned."""
    print(f"fasttransformer {command}: warning: {message}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    try:
        forced = os.environ.get("FASTTRANSFORMER_BACKEND") or NAMES[0]
        if forced not in NAMES:
            raise UsageError(f"FASTTRANSFORMER_BACKEND: {not_one_of(forced, NAMES)}")
        return args.run(args)
    except UsageError as error:
        print(f"fasttransformer {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fasttransformer {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
