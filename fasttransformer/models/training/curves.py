"""A run's curves as a picture: losses, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tasks import Task

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


def draw(log: Sequence[dict[str, float]], path: str | Path, task: Task) -> None:
    """Writes a PNG of the rows of a run's log, where there is a step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if any("loss" in row for row in log):
        figure_of(log, task).savefig(path, dpi=120)


def figure_of(log: Sequence[dict[str, float]], task: Task) -> Any:
    """The picture as matplotlib's Figure; the log has one step at least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "eval_loss" in row]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at = [row["step"] for row in steps]
    losses = [row["loss"] for row in steps]
    width = max(1, len(steps) // 50)
    means = smoothed(losses, width)
    above.plot(at, losses, color=_OURS, alpha=0.2, linewidth=0.8)
    alone = "o" if len(steps) == 1 else None  # a line of one point can't be seen
    shown = "each step" if width == 1 else f"mean of {width} steps"
    above.plot(at, means, color=_OURS, marker=alone, markersize=3, label=f"training, {shown}")
    if evaluations:
        x, y = ([row[name] for row in evaluations] for name in ("step", "eval_loss"))
        above.plot(x, y, color=_EVALUATION, marker="o", markersize=3, label="evaluation")
        best = min(evaluations, key=lambda row: row["eval_loss"])
        above.annotate(
            f"best {best['eval_loss']:.3f}, step {best['step']:.0f}",
            (best["step"], best["eval_loss"]), xytext=(0, 10), textcoords="offset points",
            ha="right" if 2 * best["step"] > at[-1] else "left", color=_EVALUATION,
        )  # fmt: skip
    # The first steps' losses would press all others into a band. Evaluations are all seen: those
    # of a model that learns its training data by heart rise.
    tallest = max(means[width:] or means)
    above.set_ylim(0.0, 1.15 * max([tallest, *(row["eval_loss"] for row in evaluations), 0.1]))
    above.set_title(f"{task.name}: training")
    above.set_ylabel(f"loss per {task.loss_unit}, nats")
    above.legend(frameon=False)
    below.plot(at, [row["rate"] for row in steps], color=_QUIET, marker=alone, markersize=3)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0")
    return figure
