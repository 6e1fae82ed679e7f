"""The report of a run: one HTML page that needs nothing else, its pictures as PNG, and a table in
Markdown.

    DIR/index.html  DIR/results.json  DIR/results.md  DIR/*.png
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

from fasttransformer.benchmarks import plots
from fasttransformer.benchmarks._shared import OURS, percent
from fasttransformer.benchmarks.record import Figures, Row, Run, save

#: Operations whose cases lie along a length.
CURVES = ("attention", "attention backward", "attention_decode")

_STYLE = """
:root { color-scheme: light dark; --ink: #0f172a; --quiet: #64748b; --line: #e2e8f0;
  --paper: #fff; --good: #0f766e; --bad: #b91c1c; --bar: #99d5cd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --quiet: #94a3b8; --line: #334155;
  --paper: #0f172a; --good: #5eead4; --bad: #fca5a5; --bar: #115e59; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1100px; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.5rem; margin: 0.2rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0.4rem; }
p, li { color: var(--quiet); max-width: 75ch; } p b, li b { color: var(--ink); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: 0.6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; min-width: 100%; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 0.25rem 0.6rem; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
td:first-child { white-space: normal; min-width: 9rem; max-width: 17rem; }
td.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent 0); }
.faster { color: var(--good); } .slower, .bad { color: var(--bad); } small { color: var(--quiet); }
nav a { margin-right: 0.9rem; color: var(--good); display: inline-block; }
"""


def rate_text(row: Row, figures: Figures) -> str:
    """A rate with its spread: "56.1 GB/s ±2 %"."""
    if figures.rate is None:
        return "wrong" if figures.wrong else "–"
    digits = 1 if figures.rate < 100 else 0
    return f"{figures.rate:.{digits}f} {row.unit} ±{percent(figures.spread)}"


def peers_of(rows: list[Row]) -> list[str]:
    """The peers of some rows, in the order of their first use."""
    return list(dict.fromkeys(name for row in rows for name in row.candidates if name != OURS))


def by_operation(run: Run) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in run.rows:
        found.setdefault(row.op, []).append(row)
    return found


def name_of(row: Row) -> str:
    return f"{row.case}, {row.dtype}" + (", cold" if row.cold else "")


# ---- Markdown -----------------------------------------------------------------------------------


def markdown(run: Run) -> str:
    """Every row as a line of a table per operation."""
    lines = [f"# {run.machine}, {run.date}", ""]
    lines += [run.ceilings_in_words, ""]
    for op, rows in by_operation(run).items():
        peers = peers_of(rows)
        head = ["case", "ours", "of ceiling", *(f"× {peer}" for peer in peers)]
        lines += [f"## {op}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in rows:
            share = "–" if row.share is None else percent(row.share)
            cells = [_ratio(row.candidates.get(peer)) for peer in peers]
            lines.append(
                f"| {name_of(row)} | {rate_text(row, row.ours)} | {share} | "
                + " | ".join(cells)
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def _ratio(figures: Figures | None) -> str:
    if figures is None:
        return "–"
    if figures.wrong:
        return "wrong"
    return "–" if figures.speedup is None else f"{figures.speedup:.2f}"


# ---- HTML ---------------------------------------------------------------------------------------


def _cell(figures: Figures | None) -> str:
    text = _ratio(figures)
    if figures is None or figures.speedup is None:
        title = f' title="{escape(figures.wrong)}"' if figures is not None and figures.wrong else ""
        return f"<td{title}>{text}</td>"
    between = f"{figures.speedup_low:.2f} to {figures.speedup_high:.2f}"
    return f'<td class="{figures.verdict}" title="{between} between the quartiles">{text}</td>'


def _table(rows: list[Row]) -> Iterator[str]:
    peers = peers_of(rows)
    yield '<div class="wide"><table><tr><th>case</th><th>fasttransformer</th><th>of ceiling</th>'
    yield "".join(f"<th>× {escape(peer)}</th>" for peer in peers) + "</tr>"
    for row in rows:
        share = '<td class="bar" style="--share: 0%">–</td>'
        if row.share is not None and row.ceiling is not None:
            name, value = row.ceiling
            share = (
                f'<td class="bar" style="--share: {min(100, round(100 * row.share))}%" '
                f'title="{escape(name)}: {value:.0f} {row.unit}">{percent(row.share)}</td>'
            )
        mark = f' class="bad" title="{escape(row.ours.wrong)}"' if row.ours.wrong else ""
        yield (
            f"<tr><td>{escape(name_of(row))}</td><td{mark}>{escape(rate_text(row, row.ours))}</td>"
            f"{share}" + "".join(_cell(row.candidates.get(peer)) for peer in peers) + "</tr>"
        )
    yield "</table></div>"


def html(run: Run, pictures: list[Path]) -> str:
    """The page, pictures inside."""
    operations = by_operation(run)
    here = run.environment
    facts = [
        f"{run.machine}; {run.date}; <code>{escape(run.command)}</code>"
        + ("" if run.complete else "; <b>cut short</b>"),
        f"ceilings, measured in the same run: {escape(run.ceilings_in_words)}",
        f"{here.get('threads')} threads on {here.get('affinity')} processors, load average at the "
        f"start {here.get('load')}; outputs on {'warm' if run.warm_pages else 'fresh'} pages",
    ]
    missing = [f"{escape(n)} ({escape(why)})" for n, why in run.peers.items() if why]
    if missing:
        facts.append("peers that are not here: " + ", ".join(missing))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>fasttransformer on {escape(run.machine)}</title><style>{_STYLE}</style>",
        "<h1>fasttransformer, measured</h1><ul>",
        *(f"<li>{fact}</li>" for fact in facts),
        "</ul><p>A rate counts what must be read and written, or computed, once. ± is half the "
        "distance of the quartiles. × is how many times faster than the peer, turn by turn in the "
        "same run; it has a colour where both quartiles are on one side of 1. “wrong”: the peer's "
        "result differs from the reference.</p><nav>",
        *(f'<a href="#{escape(_anchor(op))}">{escape(op)}</a>' for op in operations),
        "</nav>",
    ]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        image = f'<img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}">'
        image = f'<a href="{escape(picture.name)}">{image}</a>'  # in its full size
        parts.append(f'<div class="wide">{image}</div>')
    for op, rows in operations.items():
        parts.append(f'<h2 id="{escape(_anchor(op))}">{escape(op)}</h2>')
        parts.extend(_table(rows))
    return "\n".join(parts) + "</html>\n"


def _anchor(op: str) -> str:
    return op.replace(" ", "-")


def write(run: Run, directory: str | Path) -> list[Path]:
    """Writes the report; nothing half-written stays behind.

    Raises:
        OSError: the folder can't be written.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".report") as made:
        folder = Path(made)
        drawn = [
            (folder / "ratios.png", plots.ratios),
            (folder / "roofline.png", plots.roofline),
            (folder / "memory.png", plots.memory),
        ]
        pictures = [path for path, draw in drawn if draw(run, path)]
        for op in CURVES:
            path = folder / f"{op.replace(' ', '_')}.png"
            if plots.curves(run, op, path):
                pictures.append(path)
        (folder / "index.html").write_text(html(run, pictures), encoding="utf-8")
        (folder / "results.md").write_text(markdown(run) + "\n", encoding="utf-8")
        save(run, folder / "results.json")
        files = sorted(folder.iterdir())
        for file in files:
            shutil.move(file, target / file.name)
    return [target / file.name for file in files]
