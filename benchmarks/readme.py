"""The README's and the docs' tables of numbers, made from the JSON in benchmarks/results.

    python -m fasttransformer.benchmarks.readme            # writes them anew
    python -m fasttransformer.benchmarks.readme --check    # says which are not what the JSON says

A table stands between two comments, of which the first names it and its file:

    <!-- numbers: minilm minilm-zen4-avx512_bf16.json -->
    …
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttransformer.benchmarks import record
from fasttransformer.benchmarks._shared import OURS, percent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/models.md")

_MARK = re.compile(r"(<!-- numbers: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: The case of each operation that the README shows, by its name; each in its dtypes.
SHOWN = {
    "softmax": "4096×768", "layer_norm": "4096×768", "add_layer_norm": "4096×768",
    "cross_entropy": "512×32000", "attention": "1×8×2048×64 causal",
    "attention backward": "1×8×2048×64 causal", "attention_decode": "1×32/8×1×16384×128",
    "attention_varlen": "documents, 8 of 64…512", "linear_add": "2048×768→768",
    "feed_forward": "2048×384×1536 gelu training",
    "linear_cross_entropy": "2048×512→32000 forward + backward",
    "linear_topk": "1×512→32000 k 50", "embedding": "8192 of 30522×384 sinusoidal",
    "rotary_embedding": "4×32+8×2048×128",
}  # fmt: skip


def _milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.{1 if ms < 100 else 0}f} ms"


def _rows(head: list[str], body: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in body]) + "\n"


def minilm(path: Path) -> str:
    """The demo's table: MiniLM before and after the swap."""
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    body = []
    for cell in made["times"]:
        seconds = {name: v["seconds"] for name, v in cell["variants"].items()}
        rate = cell["flops"] / seconds[OURS] / 1e9
        body.append([
            f"{cell['batch']} × {cell['tokens']}", cell["dtype"],
            _milliseconds(seconds["eager"]), _milliseconds(seconds["sdpa"]),
            f"**{_milliseconds(seconds[OURS])}**", f"{seconds['sdpa'] / seconds[OURS]:.2f}",
            percent(rate / made["ceilings"][cell["dtype"]]),
        ])  # fmt: skip
    head = ["batch × tokens", "dtype", "torch eager", "torch sdpa", OURS, "× sdpa", "of ceiling"]
    return _rows(head, body)


def operations(path: Path) -> str:
    """A case of each operation, ours beside the fastest peer that is right."""
    run = record.load(path)
    body = []
    for row in run.rows:
        if SHOWN.get(row.op) != row.case or row.cold or row.dtype == "float16":
            continue
        best = row.best_peer
        figures = row.candidates.get(best or "")
        beside = "–" if figures is None or not figures.speedup else f"{figures.speedup:.2f}"
        share = "–" if row.share is None else percent(row.share)
        rate = row.ours.rate or 0.0
        value = f"{rate:.{1 if rate < 100 else 0}f} {row.unit}"
        body.append([row.op, row.case, row.dtype, value, share, beside, best or "none"])
    head = ["operation", "case", "dtype", OURS, "of ceiling", "× fastest peer", "which is"]
    return _rows(head, body)


def models(path: Path) -> str:
    """The end-to-end cases: seconds of ours and of the peer."""
    run = record.load(path)
    body = []
    for row in run.rows:
        best = row.best_peer
        if row.op != "models" or best is None or row.ours.seconds is None:
            continue
        peer = row.candidates[best]
        body.append([
            row.case, row.dtype, _milliseconds(row.ours.seconds),
            _milliseconds(peer.seconds or 0.0), best, f"{peer.speedup or 0.0:.2f}",
        ])  # fmt: skip
    return _rows(["case", "dtype", OURS, "peer", "which is", "×"], body)


TABLES: dict[str, Callable[[Path], str]] = {
    "minilm": minilm,
    "operations": operations,
    "models": models,
}


def renewed(text: str) -> str:
    """The page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        opening, name, file, closing = found.groups()
        return opening + TABLES[name](RESULTS / file) + closing

    return _MARK.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            stale.append(name)
            if not args.check:
                page.write_text(renewed(text), encoding="utf-8")
    if stale:
        print(("other numbers than their JSON: " if args.check else "renewed: ") + ", ".join(stale))
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
