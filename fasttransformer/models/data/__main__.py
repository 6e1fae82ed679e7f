"""``python -m fasttransformer.models.data TASK --out FOLDER``: files of records for a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..._arguments import Parser
from ..tokenizer import write_atomically
from . import phrases, questions, sentiment, summaries
from .records import Record, write_records

_SIDES = ("train", "dev", "held_out")
#: task → (what makes its records, their files)
MAKERS = {
    "summarize": (lambda seed: summaries.records(seed=seed), _SIDES),
    "translate": (lambda seed: phrases.records(seed=seed), _SIDES),
    "answer": (lambda seed: questions.records(seed=seed), _SIDES),
    "generate": (lambda seed: summaries.texts(seed=seed), _SIDES),
    "classify": (
        lambda seed: sentiment.records(seed=seed),
        (*_SIDES, "dev_words", "held_out_words"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files and returns 0, or 2 where they can't be written."""
    parser = Parser(
        prog="python -m fasttransformer.models.data",
        description="Writes records for a task, made from Python's own documentation or by rule; "
        "what options are chosen by, dev, and what is held out share nothing with one another or "
        "with training. For answer, passages.txt has what to find the answers in.",
    )
    parser.add_argument("task", choices=MAKERS)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made if need be")
    parser.add_argument("--seed", type=int, default=0, help="another split (0)")
    args = parser.parse_args(argv)
    make, names = MAKERS[args.task]
    found: tuple[list[Record], ...] = make(args.seed)
    try:
        for name, records in zip(names, found):
            path = Path(args.out) / f"{name}.jsonl"
            write_records(path, records)
            print(f"{path}: {len(records)} records")
        if args.task == "answer":
            path, passages = Path(args.out) / "passages.txt", questions.passages()
            write_atomically(path, "".join(f"{line}\n" for line in passages).encode())
            print(f"{path}: {len(passages)} passages")
    except OSError as error:
        print(f"--out: {path} can't be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
