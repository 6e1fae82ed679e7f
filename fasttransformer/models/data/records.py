"""Files of JSON lines: one object a line, its fields by task.

| task | fields |
|---|---|
| summarize | ``text``, ``summary`` |
| translate | ``source``, ``target`` |
| answer | ``question``, ``context``, ``answer``; optional ``start`` |
| generate | ``text`` |
| classify | ``text``, ``label`` |

All are strings but ``start``, the place of the answer's first character in the context where it
occurs more than once. An empty ``answer`` says that the context has none. Other fields are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..tokenizer import write_atomically

Record = dict[str, Any]
#: task → the fields of a record, all strings
FIELDS = {
    "summarize": ("text", "summary"),
    "translate": ("source", "target"),
    "answer": ("question", "context", "answer"),
    "generate": ("text",),
    "classify": ("text", "label"),
}


class BadRecords(ValueError):
    """A file of records can't be read: the message has the file, the line and what was expected."""


def expected(fields: Sequence[str]) -> str:
    """What a line must be.

    >>> expected(("text", "label"))
    '{"text": "…", "label": "…"}'
    """
    return "{" + ", ".join(f'"{name}": "…"' for name in fields) + "}"


def read_records(
    path: str | os.PathLike[str],
    fields: Sequence[str],
    problem: Callable[[Record], str | None] = lambda record: None,
) -> list[Record]:
    """All records of a file, with each of ``fields`` a string.

    Args:
        path: the file.
        fields: names that each record must have.
        problem: says what else is wrong with a record, or None.

    Raises:
        BadRecords: the file can't be read or holds no record; a line is blank, is no JSON object,
            or lacks a field; a field is no string; a ``start`` is not where the answer is.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     write_records(file.name, [{"text": "Great.", "label": "good"}])
    ...     read_records(file.name, FIELDS["classify"])
    [{'text': 'Great.', 'label': 'good'}]
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise BadRecords(f"{path} can't be read: {error.strerror}") from None
    if lines[-1].strip() == b"":
        lines.pop()
    wanted = f"expected {expected(fields)}"
    if not lines:
        raise BadRecords(f"{path} is empty; {wanted} in each line")
    records = []
    for number, line in enumerate(lines, 1):
        wrong, record = _record_of(line, fields)
        wrong = wrong or problem(record)
        if wrong:
            raise BadRecords(f"{path}, line {number}: {wrong}; {wanted}")
        records.append(record)
    return records


def _record_of(line: bytes, fields: Sequence[str]) -> tuple[str | None, Record]:
    if not line.strip():
        return "the line is blank", {}
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 (byte {error.start + 1})", {}
    except (json.JSONDecodeError, RecursionError) as error:
        return f"the line is not JSON ({error})", {}
    if not isinstance(record, dict):
        return f"the line is {_kind(record)}, not an object", {}
    for name in fields:
        if name not in record:
            return f'"{name}" is missing', {}
        if not isinstance(record[name], str):
            return f'"{name}" is {_kind(record[name])}, not a string', {}
    start = record.get("start") if "context" in fields else None
    if start is not None:
        if not isinstance(start, int) or isinstance(start, bool):
            return f'"start" is {_kind(start)}, not an integer', {}
        if start < 0 or not record["context"].startswith(record["answer"], start):
            return f'"answer" is not at "start", {start}, of "context"', {}
    return None, record


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}  # fmt: skip
    return names[type(value)]


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Writes JSON lines, the whole file or nothing."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(Path(path), text.encode("utf-8", "surrogatepass"))
