"""A run's curves as a picture: losses, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_OURS, _EVALUATION, _QUIET = "#0f766e", "#c2410c", "#64748b"


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to ``width − 1`` before it.

    >>> smoothed([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))
    ]


def draw(log: Sequence[dict[str, float]], path: str | Path) -> None:
    """Writes a PNG of the rows of a run's log.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "eval_loss" in row]
    if not steps:
        return
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at = [row["step"] for row in steps]
    losses = [row["loss"] for row in steps]
    width = max(1, len(steps) // 50)
    above.plot(at, losses, color=_OURS, alpha=0.2, linewidth=0.8)
    above.plot(at, smoothed(losses, width), color=_OURS, label=f"training, mean of {width} steps")
    if evaluations:
        x, y = ([row[name] for row in evaluations] for name in ("step", "eval_loss"))
        above.plot(x, y, color=_EVALUATION, marker="o", markersize=3, label="evaluation")
        best = min(evaluations, key=lambda row: row["eval_loss"])
        above.annotate(
            f"best {best['eval_loss']:.3f}, step {best['step']:.0f}",
            (best["step"], best["eval_loss"]), xytext=(0, 10), textcoords="offset points",
            ha="right", color=_EVALUATION,
        )  # fmt: skip
    # The first steps' losses would press all others into a band.
    above.set_ylim(0.0, 1.15 * max(smoothed(losses, width)[min(width, len(losses) - 1)], 0.1))
    above.set_ylabel("loss per token, nats")
    above.legend(frameon=False)
    below.plot(at, [row["rate"] for row in steps], color=_QUIET)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0")
    figure.savefig(path, dpi=120)
