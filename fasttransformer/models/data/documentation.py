"""Python's own documentation as entries: a name, a summary, and what is said beyond it.

Three places are read, all part of every Python: the docstrings in the standard library's source
files (which are parsed, never run), those of the built-in and compiled modules, and the language
reference in ``pydoc_data.topics``. Another version of Python gives somewhat other entries.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Folders and files of the standard library that are tests or tools, or run something on import.
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
_NOT_IMPORTED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(])")
_NO_SENTENCE_END = ("e.g.", "i.e.", "etc.", "vs.", "cf.", "resp.", "approx.")


@dataclass(frozen=True)
class Entry:
    """What the documentation says of one thing.

    Attributes:
        module: ``json.decoder``, or the topic of the language reference.
        name: ``JSONDecoder.decode``; empty for a module or a section.
        kind: function, class, module or section.
        summary: the first sentence, or a section's title.
        text: the rest, one paragraph a line; may be empty.
        parameters: names of a function's parameters.
    """

    module: str
    name: str
    kind: str
    summary: str
    text: str
    parameters: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        """Kind and name in words.

        >>> Entry("asyncio", "Server.startServing_soon", "function", "", "").heading
        'function Server start Serving soon'
        """
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"[._]+", " ", self.name))
        return " ".join([self.kind, *words.split()])


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences.

    >>> sentences("One line, e.g. This one. And (here)  another.")
    ['One line, e.g. This one.', 'And (here) another.']
    """
    pieces: list[str] = []
    for piece in _SENTENCE_END.split(" ".join(paragraph.split())):
        if pieces and pieces[-1].endswith(_NO_SENTENCE_END):
            pieces[-1] += " " + piece
        elif piece:
            pieces.append(piece)
    return pieces


def entry_of(
    module: str, name: str, kind: str, docstring: str, parameters: tuple[str, ...] = ()
) -> Entry | None:
    """The entry of a docstring; None where its first paragraph is no sentence."""
    paragraphs = [p for p in inspect.cleandoc(docstring).split("\n\n") if p.strip()]
    # Older docstrings of compiled functions begin with their signature.
    while paragraphs and re.match(r"[\w.]+\s*\(.*\)\s*(->.*)?$", paragraphs[0].split("\n")[0]):
        _, _, rest = paragraphs[0].partition("\n")
        paragraphs = [rest, *paragraphs[1:]] if rest.strip() else paragraphs[1:]
    if not paragraphs:
        return None
    first, *others = sentences(paragraphs[0])
    words = first.split()
    if not 3 <= len(words) <= 30 or not first[0].isalpha() or "::" in first or ">>>" in first:
        return None
    body = [" ".join(others), *(" ".join(p.split()) for p in paragraphs[1:])]
    return Entry(module, name, kind, first, "\n".join(p for p in body if p), parameters)


def _source_entries() -> Iterator[Entry | None]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT & set(parts) or any(part.startswith("config-") for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        docstring = ast.get_docstring(tree)
        if docstring:
            yield entry_of(module, "", "module", docstring)
        yield from _definitions(tree, module, "")


def _definitions(node: ast.AST, module: str, prefix: str) -> Iterator[Entry | None]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _definitions(child, module, prefix)
            continue
        docstring, kind = ast.get_docstring(child), "class"
        parameters: tuple[str, ...] = ()
        if not isinstance(child, ast.ClassDef):
            kind = "function"
            named = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            parameters = tuple(a.arg for a in named if a.arg not in ("self", "cls"))
        if docstring:
            yield entry_of(module, prefix + child.name, kind, docstring, parameters)
        yield from _definitions(child, module, f"{prefix}{child.name}.")


def _compiled_entries() -> Iterator[Entry | None]:
    functions = (
        types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
        types.WrapperDescriptorType, types.GetSetDescriptorType,
    )  # fmt: skip
    for module in sorted({*sys.builtin_module_names, *sys.stdlib_module_names} - _NOT_IMPORTED):
        if module.startswith("_test") or module.startswith("_x"):
            continue
        file = getattr(importlib.util.find_spec(module), "origin", None) or ""
        if file.endswith(".py"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # modules on their way out
                found = vars(importlib.import_module(module))
        except ImportError:
            continue
        for name, thing in sorted(found.items()):
            if isinstance(thing, type):
                yield _compiled(module, name, "class", thing)
                for attribute, member in sorted(vars(thing).items()):
                    if isinstance(member, functions):
                        yield _compiled(module, f"{name}.{attribute}", "function", member)
            elif isinstance(thing, functions):
                yield _compiled(module, name, "function", thing)


def _compiled(module: str, name: str, kind: str, thing: object) -> Entry | None:
    docstring = getattr(thing, "__doc__", None)
    return entry_of(module, name, kind, docstring) if isinstance(docstring, str) else None


def _sections() -> Iterator[Entry | None]:
    """Sections of the language reference: a title over a line of ``*``, ``=`` or ``-``."""
    from pydoc_data.topics import topics

    heading = re.compile(r"^(\S.*)\n([*=\-~])\2{2,}$", re.MULTILINE)
    for topic, page in sorted(topics.items()):
        marks = list(heading.finditer(page))
        for mark, following in zip(marks, [*marks[1:], None]):
            text = page[mark.end() : following.start() if following else None]
            lines = [
                " ".join(p.split())
                for p in text.split("\n\n")
                if p.strip() and not p.startswith("   ") and "::=" not in p
            ]
            if lines:
                title = mark[1].replace('"', "'")
                yield Entry(topic, "", "section", title, "\n".join(lines))


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, each text once, in an order that is the same from run to run.

    >>> len(entries()) > 3000, all(entry.summary for entry in entries())
    (True, True)
    """
    found: dict[tuple[str, str, str], Entry] = {}
    for source in (_source_entries, _compiled_entries, _sections):
        for entry in source():
            if entry is not None:
                last = entry.name.rpartition(".")[2]
                found.setdefault((last, entry.summary, entry.text), entry)
    return tuple(found.values())
