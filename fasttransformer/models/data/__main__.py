"""``python -m fasttransformer.models.data TASK --out FOLDER``: files of records for a task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import phrases, questions, sentiment, summaries
from .records import Record, write_records

#: task → (what makes its records, their files)
MAKERS = {
    "summarize": (lambda seed: summaries.records(seed=seed), ("train", "held_out")),
    "translate": (lambda seed: phrases.records(seed=seed), ("train", "held_out")),
    "answer": (lambda seed: questions.records(seed=seed), ("train", "held_out")),
    "generate": (lambda seed: summaries.texts(seed=seed), ("train", "held_out")),
    "classify": (lambda seed: sentiment.records(seed=seed), ("train", "held_out", "new_words")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files and returns 0, or 2 where they can't be written."""
    parser = argparse.ArgumentParser(
        prog="python -m fasttransformer.models.data",
        description="Writes records for a task, made from Python's own documentation or by rule; "
        "held-out records share nothing with those for training.",
    )
    parser.add_argument("task", choices=MAKERS)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made if need be")
    parser.add_argument("--seed", type=int, default=0, help="another split (0)")
    args = parser.parse_args(argv)
    make, names = MAKERS[args.task]
    found: tuple[list[Record], ...] = make(args.seed)
    for name, records in zip(names, found):
        path = Path(args.out) / f"{name}.jsonl"
        try:
            write_records(path, records)
        except OSError as error:
            print(f"--out: {path} can't be written: {error.strerror}", file=sys.stderr)
            return 2
        print(f"{path}: {len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
