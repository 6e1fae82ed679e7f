"""Lines for a shell, as pages and help texts show them, read as the program reads them."""

import re
import shlex

from fasttransformer.cli import parser

PROGRAM = "fasttransformer"


def lines_of(text: str) -> list[str]:
    """The lines that call the program with a command, each with what continues it."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(rf"\b{PROGRAM} [a-z]", line)]


def understood(line: str) -> None:
    """Leaves with argparse's status where the line has an option that there isn't."""
    words = iter(shlex.split(line, comments=True))
    assert PROGRAM in words  # reads on up to it
    given = []
    for word in words:
        if word in ("|", "<", ">"):
            break
        given.append(word.removesuffix(";"))
        if word.endswith(";"):
            break
    if given[-1] != "…":  # what a reader fills in may be required
        parser().parse_args(given)
