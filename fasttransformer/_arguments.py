"""Programs' arguments: what is wrong with them is said in one line, with the nearest right word."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


def _nearest(given: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(given, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def not_one_of(given: str, names: Iterable[str]) -> str:
    """What is said of a word that is not among ``names``.

    >>> not_one_of("summary", ("summarize", "translate"))
    "'summary' is not one of summarize, translate; did you mean summarize?"
    >>> not_one_of("paint", ("summarize", "translate"))
    "'paint' is not one of summarize, translate"
    """
    names = list(names)
    return f"{given!r} is not one of {', '.join(names)}{_nearest(given, names)}"


class Parser(argparse.ArgumentParser):
    """One line on bad use, where argparse's own class prints all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` shows the options)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(str(value), action.choices))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command's parser, too, knows all of its arguments: the top one can't name the nearest.

        (argparse calls this on the parser of a command, and hands what is left to the top one.)
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            first = unknown[0].split("=")[0]
            if not first.startswith("-"):
                self.error(f"{first!r} is one argument too many")
            options = [name for action in self._actions for name in action.option_strings]
            self.error(f"there is no option {first}{_nearest(first, options)}")
        return found, unknown
