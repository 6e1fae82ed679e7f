"""The report's pictures: roofline, curves over length, memory over length, ratios by operation.

Each takes a run and writes a PNG, or returns False where the run has nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttransformer.benchmarks._shared import OURS
from fasttransformer.benchmarks.record import Row, Run

INK, QUIET, LINE = "#0f172a", "#64748b", "#cbd5e1"
ACCENT = "#0f766e"
PEERS = ("#b45309", "#1d4ed8", "#be185d", "#6d28d9", "#4d7c0f", "#0e7490", "#a16207", "#9f1239")
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": LINE,
    "axes.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#eef2f7", "axes.axisbelow": True,
    "legend.frameon": False,
}  # fmt: skip


def _plt() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> bool:
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return True


def colours(candidates: Sequence[str]) -> dict[str, str]:
    """Ours in the accent, the others in a fixed order."""
    others = [name for name in candidates if name != OURS]
    return {OURS: ACCENT} | {name: PEERS[i % len(PEERS)] for i, name in enumerate(others)}


# ---- roofline -----------------------------------------------------------------------------------


def roofline(run: Run, path: Path) -> bool:
    """Attained GFLOP/s over flops per byte, under what arithmetic and memory allow."""
    rows = [row for row in run.rows if row.intensity and row.ours.seconds and not row.cold]
    roofs = {n: v for n, (v, unit) in run.ceilings.items() if unit == "GFLOP/s"}
    slopes = {n: v for n, (v, unit) in run.ceilings.items() if unit == "GB/s" and "copy" in n}
    if not rows or not roofs or not slopes:
        return False
    plt = _plt()
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(9, 5.6))
        xs = [row.intensity or 1.0 for row in rows]
        left, right = min(xs) / 2, max(max(xs) * 2, 200.0)
        top = max(roofs.values())
        rates = [row.flops / (row.ours.seconds or 1.0) / 1e9 for row in rows]
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(left, right)
        axis.set_ylim(min(rates) / 2, top * 2)
        for name, bandwidth in slopes.items():
            end = top / bandwidth
            axis.plot([left, end], [left * bandwidth, top], color=QUIET, linewidth=1)
            ends = axis.transData.transform([(left, left * bandwidth), (end, top)])
            across, up = ends[1] - ends[0]
            axis.annotate(
                f"{name}, {bandwidth:.0f} GB/s", (left * 1.15, left * 1.25 * bandwidth),
                rotation=math.degrees(math.atan2(up, across)), rotation_mode="anchor",
                fontsize=8, color=QUIET,
            )  # fmt: skip
        for name, value in roofs.items():
            start = value / max(slopes.values())
            axis.plot([start, right], [value, value], color=QUIET, linewidth=1)
            axis.annotate(f"{name}, {value:.0f} GFLOP/s", (right, value), ha="right", va="bottom",
                          fontsize=8, color=QUIET)  # fmt: skip
        operations = list(dict.fromkeys(row.op for row in rows))
        palette = [c for name in ("tab20", "tab20b") for c in plt.get_cmap(name).colors]
        for i, op in enumerate(operations):
            for dtype, marker in (("float32", "o"), ("bfloat16", "s"), ("float16", "^")):
                mine = [row for row in rows if row.op == op and row.dtype == dtype]
                if not mine:
                    continue
                axis.scatter(
                    [row.intensity for row in mine],
                    [row.flops / (row.ours.seconds or 1.0) / 1e9 for row in mine],
                    s=26, marker=marker, color=palette[i % len(palette)], edgecolor="white",
                    linewidth=0.5,
                    label=op if dtype == mine[0].dtype and _first(rows, op) == dtype else None,
                    zorder=3,
                )  # fmt: skip
        axis.set_xlabel("flops per byte that must move")
        axis.set_ylabel("GFLOP/s attained")
        axis.set_title("Roofline: every operation under this machine's ceilings",
                       loc="left", fontweight="bold")  # fmt: skip
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8,
                    title="● float32  ■ bfloat16", title_fontsize=8)  # fmt: skip
        return _save(plt, figure, path)


def _first(rows: Sequence[Row], op: str) -> str:
    return next(row.dtype for row in rows if row.op == op)


def _count(value: float, _: int) -> str:
    return f"{value / 1024:.0f}k" if value >= 1024 else f"{value:.0f}"


def _mebibytes(value: float, _: int) -> str:
    return f"{value / 1024:.0f} GiB" if value >= 1024 else f"{value:.0f} MiB"


# ---- curves -------------------------------------------------------------------------------------


def curves(run: Run, op: str, path: Path) -> bool:
    """An operation's rate over what its cases lie along, a panel per curve, a line per peer."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        if row.op == op and row.along and row.ours.seconds:
            groups.setdefault((row.along[0], row.dtype), []).append(row)
    titles = [title for title, rows in groups.items() if len(rows) > 1]
    if not titles:
        return False
    plt = _plt()
    names = list(dict.fromkeys(n for t in titles for row in groups[t] for n in row.candidates))
    colour = colours(names)
    columns = min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            lines, columns, figsize=(3.6 * columns, 2.7 * lines), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for panel, (title, dtype) in zip(axes.flat, titles):
            mine = groups[title, dtype]
            mine.sort(key=lambda r: r.along[1] if r.along else 0.0)
            for name in names:
                points = [
                    (r.along[1], figures.rate)
                    for r in mine
                    if r.along and (figures := r.candidates.get(name)) and figures.rate
                ]
                if points:
                    panel.plot(*zip(*points), marker="o", markersize=3, color=colour[name],
                               linewidth=2 if name == OURS else 1.2, label=name)  # fmt: skip
            if mine[0].ceiling:
                what, value = mine[0].ceiling
                panel.axhline(value, color=QUIET, linewidth=1, linestyle=":")
                panel.annotate(what, (1, value), xycoords=("axes fraction", "data"), ha="right",
                               va="bottom", fontsize=7, color=QUIET)  # fmt: skip
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(_count)
            panel.set_ylim(bottom=0)
            panel.set_title(f"{title}, {dtype}", loc="left", fontsize=9)
            panel.set_ylabel(mine[0].unit, fontsize=8)
        for panel in list(axes.flat)[len(titles) :]:
            panel.axis("off")
        handles = {h.get_label(): h for panel in axes.flat for h in panel.get_lines()
                   if not str(h.get_label()).startswith("_")}  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="outside lower center",
                      ncols=min(5, len(handles)), fontsize=8)  # fmt: skip
        figure.suptitle(f"{op}: rate over length", x=0.01, ha="left", fontweight="bold")
        return _save(plt, figure, path)


# ---- memory -------------------------------------------------------------------------------------


def memory(run: Run, path: Path) -> bool:
    """Peak memory over length, a panel per operation."""
    operations = list(dict.fromkeys(m.op for m in run.memory))
    if not operations:
        return False
    plt = _plt()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(operations), figsize=(4.6 * len(operations), 3.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for panel, op in zip(axes.flat, operations):
            names = list(dict.fromkeys(m.candidate for m in run.memory if m.op == op))
            colour = colours(names)
            for name in names:
                points = [(m.length, m.bytes / 2**20) for m in run.memory
                          if (m.op, m.candidate) == (op, name)]  # fmt: skip
                panel.plot(*zip(*points), marker="o", markersize=3.5, color=colour[name],
                           linewidth=2 if name == OURS else 1.2, label=name)  # fmt: skip
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.xaxis.set_major_formatter(_count)
            panel.yaxis.set_major_formatter(_mebibytes)
            panel.set_xlabel("tokens")
            panel.set_title(op, loc="left", fontsize=9)
            panel.legend(fontsize=8)
        figure.suptitle("Peak memory of forward + backward, inputs not counted",
                        x=0.01, ha="left", fontweight="bold")  # fmt: skip
        return _save(plt, figure, path)


# ---- ratios -------------------------------------------------------------------------------------


def ratios(run: Run, path: Path) -> bool:
    """How many times faster ours is, by operation and peer: geometric means over the cases."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in run.rows:
        for name, figures in row.candidates.items():
            if figures.speedup and not row.cold:
                found.setdefault((f"{row.op}, {row.dtype}", name), []).append(figures.speedup)
    if not found:
        return False
    lines = list(dict.fromkeys(op for op, _ in found))
    peers = list(dict.fromkeys(name for _, name in found))
    plt = _plt()
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(2.6 + 0.95 * len(peers), 1.2 + 0.27 * len(lines)))
        for (op, name), values in found.items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            x, y = peers.index(name), lines.index(op)
            strength = max(-1.0, min(1.0, math.log2(mean) / 2))
            colour = _mixed(ACCENT if strength > 0 else "#b91c1c", 0.85 * abs(strength))
            axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white"))
            axis.text(x + 0.5, y + 0.5, f"{mean:.{2 if mean < 10 else 0}f}", ha="center",
                      va="center", fontsize=8,
                      color="white" if abs(strength) > 0.6 else INK)  # fmt: skip
        axis.set_xlim(0, len(peers))
        axis.set_ylim(len(lines), 0)
        axis.set_xticks([i + 0.5 for i in range(len(peers))], [p.replace(" ", "\n") for p in peers],
                        fontsize=8)  # fmt: skip
        axis.set_yticks([i + 0.5 for i in range(len(lines))], lines, fontsize=8)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelcolor=INK)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_title("Times faster than each peer (geometric mean of the cases)", loc="left",
                       fontweight="bold", pad=14)  # fmt: skip
        return _save(plt, figure, path)


def _mixed(colour: str, share: float) -> tuple[float, float, float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    mixed = [1 - share + share * part for part in parts]
    return mixed[0], mixed[1], mixed[2]
