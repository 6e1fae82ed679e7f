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
PEERS = (
    "#b45309", "#1d4ed8", "#be185d", "#6d28d9", "#4d7c0f", "#0891b2", "#facc15", "#7f1d1d",
    "#475569",
)  # fmt: skip
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
            axis.annotate(f"{name}, {value:.0f} GFLOP/s", (start, value), xytext=(2, 3),
                          textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
        operations = sorted(dict.fromkeys(row.op for row in rows), key=_family)
        numbers = []
        for i, op in enumerate(operations, 1):
            mine = [row for row in rows if row.op == op]
            places = [(row.intensity or 1.0, rate) for row, rate in zip(rows, rates) if row in mine]
            colour = FAMILIES[_family(op)][1]
            for dtype, marker in (("float32", "o"), ("bfloat16", "s"), ("float16", "^")):
                points = [at for at, row in zip(places, mine) if row.dtype == dtype]
                if points:
                    axis.scatter(*zip(*points), s=26, marker=marker, color=colour, zorder=3,
                                 edgecolor="white", linewidth=0.5)  # fmt: skip
            numbers.append((i, max(places, key=lambda at: at[1]), colour))
        _number(axis, numbers)
        axis.set_xlabel("flops per byte that must move")
        axis.set_ylabel("GFLOP/s attained")
        axis.set_title("Roofline: every operation under this machine's ceilings",
                       loc="left", fontweight="bold")  # fmt: skip
        entries = [plt.Line2D([], [], linestyle="", marker=f"${i}$", markersize=7, label=op,
                              color=FAMILIES[_family(op)][1])
                   for i, op in enumerate(operations, 1)]  # fmt: skip
        axis.legend(handles=entries, loc="upper left", bbox_to_anchor=(0.0, -0.12), fontsize=8,
                    ncols=4, title="number at an operation's highest point   "
                    "● float32  ■ bfloat16", title_fontsize=8)  # fmt: skip
        return _save(plt, figure, path)


#: What the roofline colours: a family's first operations' words, and its colour.
FAMILIES = (
    (("attention",), "#0f766e"),
    (("linear_add", "feed_forward", "minilm", "models"), "#1d4ed8"),
    (("linear_", "cross_entropy"), "#b45309"),
    (("",), "#be185d"),
)


def _family(op: str) -> int:
    return next(i for i, (words, _) in enumerate(FAMILIES) if any(word in op for word in words))


def _number(axis: Any, numbers: list[tuple[int, tuple[float, float], str]]) -> None:
    """Writes each operation's number above its highest point; higher where one stands already."""
    from matplotlib.patheffects import withStroke

    taken: list[tuple[float, float]] = []
    halo = [withStroke(linewidth=2, foreground="white")]
    for i, at, colour in sorted(numbers, key=lambda one: one[1][1]):
        x, y = axis.transData.transform(at)
        y += 9
        while any(abs(x - other) < 16 and abs(y - height) < 13 for other, height in taken):
            y += 3
        taken.append((x, y))
        axis.annotate(str(i), at, xytext=axis.transData.inverted().transform((x, y)),
                      fontsize=8, fontweight="bold", color=colour, ha="center", va="center",
                      zorder=4, path_effects=halo)  # fmt: skip


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
    found: dict[str, dict[str, list[float]]] = {}
    for row in run.rows:
        for name, figures in row.candidates.items():
            if figures.speedup and not row.cold:
                peers = found.setdefault(f"{row.op}, {row.dtype}", {})
                peers.setdefault(name, []).append(figures.speedup)
    if not found:
        return False
    names = list(dict.fromkeys(name for peers in found.values() for name in peers))
    colour = colours(names)
    plt = _plt()
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 1.4 + 0.21 * len(found)))
        axis.axvline(1.0, color=INK, linewidth=1)
        for y, peers in enumerate(found.values()):
            means = {n: math.exp(sum(map(math.log, v)) / len(v)) for n, v in peers.items()}
            axis.plot([1.0, *means.values()], [y] * (len(means) + 1), color=LINE, linewidth=1,
                      zorder=1)  # fmt: skip
            for name, mean in means.items():
                axis.scatter(mean, y, s=24, color=colour[name], zorder=2)
            text = "  ".join(f"{mean:.{2 if mean < 10 else 0}f}" for mean in sorted(means.values()))
            axis.annotate(text, (max(1.0, *means.values()), y), xytext=(7, 0), va="center",
                          textcoords="offset points", fontsize=7, color=QUIET)  # fmt: skip
        axis.set_xscale("log", base=2)
        low, high = axis.get_xlim()
        axis.set_xlim(low, 1.35 * high)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
        axis.set_ylim(len(found) - 0.3, -0.7)
        axis.set_yticks(range(len(found)), list(found), fontsize=8, color=INK)
        axis.tick_params(length=0)
        axis.spines["left"].set_visible(False)
        handles = [plt.Line2D([], [], linestyle="", marker="o", markersize=5, color=colour[name],
                              label=name) for name in names]  # fmt: skip
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, -0.6 / len(found)),
                    ncols=4, fontsize=8, handletextpad=0.1)  # fmt: skip
        axis.set_title("Times faster than each peer (geometric mean of the cases)", loc="left",
                       fontweight="bold")  # fmt: skip
        return _save(plt, figure, path)
