"""The demo's picture: one panel per size and dtype, a bar per variant, time from zero.

Each panel has its own time axis (the sizes are a hundredfold apart); within a panel lengths are
times, so half as long is twice as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttransformer.benchmarks._shared import OURS, dtype_name
from fasttransformer.benchmarks.minilm import VARIANTS, Cell

_COLOURS = {OURS: "#0f766e", "sdpa": "#94a3b8", "eager": "#cbd5e1"}
_LABELS = {OURS: "fasttransformer", "sdpa": "torch sdpa", "eager": "torch eager"}
_INK, _QUIET = "#0f172a", "#64748b"


def milliseconds(seconds: float) -> str:
    """Three digits: "4.52 ms", "38.1 ms", "431 ms".

    >>> milliseconds(0.00452), milliseconds(0.431)
    ('4.52 ms', '431 ms')
    """
    ms = seconds * 1e3
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f} ms"


def draw(cells: Sequence[Cell], ceilings: dict[str, float], subtitle: str, path: Path) -> None:
    """Writes a PNG of the cells; ``ceilings`` is dtype name → GFLOP/s (empty: not measured)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    sizes = list(dict.fromkeys((cell.batch, cell.length) for cell in cells))
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK}):
        # In inches, so that the margins hold whatever number of panels there is.
        width, height = 1.2 + 3.75 * len(sizes), 1.1 + 1.75 * len(dtypes)
        figure, axes = plt.subplots(
            len(dtypes), len(sizes), figsize=(width, height), squeeze=False
        )  # fmt: skip
        figure.subplots_adjust(
            left=1.2 / width, right=1 - 0.1 / width, bottom=0.15 / height, top=1 - 1.05 / height,
            hspace=0.5, wspace=0.1,
        )  # fmt: skip
        left = 0.15 / width
        figure.text(left, 1 - 0.34 / height, "MiniLM, time of one forward pass",
                    fontsize=14, fontweight="bold")  # fmt: skip
        figure.text(left, 1 - 0.60 / height, subtitle, fontsize=9, color=_QUIET)
        for cell in cells:
            row, column = dtypes.index(cell.dtype), sizes.index((cell.batch, cell.length))
            _panel(axes[row][column], cell, ceilings.get(dtype_name(cell.dtype)), column == 0)
        for row in axes:
            for panel in row:
                if not panel.has_data():
                    panel.axis("off")
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _panel(panel, cell: Cell, ceiling: float | None, first: bool) -> None:
    longest = max(timing.median for timing in cell.times.values())
    for i, name in enumerate(VARIANTS):
        timing = cell.times.get(name)
        colour = _INK if name == OURS else _QUIET
        weight = "bold" if name == OURS else "normal"
        if timing is None:
            if name in cell.left_out:
                panel.text(
                    0, i, f" {cell.left_out[name]}", va="center", color=_QUIET, style="italic"
                )
            continue
        panel.barh(i, timing.median, height=0.68, color=_COLOURS[name])
        panel.plot([timing.low, timing.high], [i, i], color=_INK, linewidth=1, alpha=0.55,
                   solid_capstyle="butt")  # fmt: skip
        label = milliseconds(timing.median)
        if ceiling is not None:
            label += f" · {cell.flops / timing.median / 1e9 / ceiling:.0%} of ceiling"
        panel.text(max(timing.median, timing.high) + longest * 0.015, i, label, va="center",
                   color=colour, fontweight=weight, fontsize=8.5)  # fmt: skip
    panel.set_title(f"{dtype_name(cell.dtype)}, {cell.batch} × {cell.length} tokens",
                    loc="left", fontsize=10, color=_INK)  # fmt: skip
    panel.set_xlim(0, longest * (1.9 if not cell.left_out else 3.2))
    panel.set_ylim(len(VARIANTS) - 0.45, -0.55)
    panel.set_yticks(range(len(VARIANTS)), [_LABELS[name] for name in VARIANTS] if first else [])
    panel.set_xticks([])
    panel.tick_params(length=0, labelcolor=_INK)
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
    panel.spines["left"].set_color("#cbd5e1")
