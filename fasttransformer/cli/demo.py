"""``fasttransformer demo``: a real model before and after ``ft.swap``: is it right, is it faster?

MiniLM and the sentences it reads are described in ``benchmarks/minilm.py``. The report goes to the
screen and, with the numbers as JSON and a picture, into a folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..benchmarks import ceilings
from ..benchmarks._shared import OURS, dtype_name, environment
from ._output import UsageError, command, console, escape, progress, table

QUESTION = "How can I run code when an exception is raised?"
#: Past this many seconds the remaining sizes are timed once only.
PATIENCE = 120.0


class _Demo:
    """One run: its console (kept for report.txt), findings, and numbers for results.json."""

    def __init__(self, quick: bool, out: Path) -> None:
        from ..benchmarks import minilm

        self.minilm = minilm
        self.quick = quick
        self.folder = out
        self.out: Console = console(record=True)
        self.start = time.monotonic()
        self.findings: list[str] = []
        self.results: dict[str, Any] = {"environment": environment()}
        self.cells: list[Any] = []
        self.memory: dict[torch.dtype, dict[str, int | None]] = {}

    def late(self) -> bool:
        return time.monotonic() - self.start > PATIENCE

    # ---- steps ----------------------------------------------------------------------------------

    def introduce(self) -> None:
        here = self.results["environment"]
        isa = here.get("cpu_isa", "no C++ kernels")
        self.subtitle = (
            f"{here['cpu']}, {isa}, threads: {here['threads']}, torch {here['torch'].split('+')[0]}"
        )
        self.out.print(f"[bold]fasttransformer {here['fasttransformer']}[/] on {self.subtitle}")
        self.out.print(
            "MiniLM (BERT, 6 layers, hidden size 384), pretrained, reading sentences from Python's "
            "own documentation\n"
        )

    def swap(self, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
        models, report = self.minilm.variants(dtype)
        if dtype == torch.float32:
            self.out.print("[bold]ft.swap(model)[/]")
            self.out.print(escape(str(report)) + "\n")
            if not report.swapped:
                self.findings.append("nothing was swapped")
        return models, report

    def verify(self, report: Any, dtype: torch.dtype) -> None:
        inputs = self.minilm.padded(self.minilm.sentences()[:4])
        result = report.verify(**inputs, show=False)
        name = dtype_name(dtype)
        verdict = "[green]ok[/]" if result.ok else "[red]FAILED[/]"
        if result.problem is not None:
            text = escape(result.problem)
        else:
            within = sum(entry.ok for entry in result.gradients)
            text = (
                f"outputs off by {result.max_error:.1e} from float64 (the original: "
                f"{result.reference_error:.1e}); {within} of {len(result.gradients)} gradients "
                "within twice the original's error"
            )
        self.out.print(f"verify, {name}: {verdict}, {text}")
        if not result.ok:
            self.out.print(escape(str(result)))
            self.findings.append(f"verification in {name} failed")
        self.results.setdefault("verify", {})[name] = {
            "ok": result.ok,
            "max_error": result.max_error,
            "reference_error": result.reference_error,
            "problem": result.problem,
        }

    def search(self, models: dict[str, Any]) -> None:
        texts = list(self.minilm.sentences())[:: 8 if self.quick else 3]
        before = self.minilm.nearest(models["sdpa"], QUESTION, texts)
        after = self.minilm.nearest(models[OURS], QUESTION, texts)
        same = [i for _, i in before] == [i for _, i in after]
        self.out.print(f"\n[bold]{QUESTION}[/]  (nearest of {len(texts)} sentences after the swap)")
        for score, i in after:
            self.out.print(f"  {score:.4f}  {escape(texts[i])}")
        moved = max(abs(a[0] - b[0]) for a, b in zip(before, after, strict=True))
        if same:
            self.out.print(
                "  [green]unchanged[/]: the same five in the same order before the swap, cosines "
                f"within {moved:.1e}"
            )
        else:
            self.out.print("  [red]CHANGED[/] by the swap")
        if not same:
            self.findings.append("the search result changed")
        self.results["search"] = {
            "question": QUESTION,
            "unchanged": same,
            "nearest": [{"cosine": score, "sentence": texts[i]} for score, i in after],
        }

    def measure(self, models: dict[str, Any], dtype: torch.dtype, bar: Any, task: Any) -> None:
        sizes = self.minilm.SIZES[:2] if self.quick else self.minilm.SIZES
        cost: dict[str, float] = {}
        for batch, length in sizes:
            bar.update(task, description=f"{dtype_name(dtype)}, {batch} × {length}")
            self._ceiling(dtype)
            budget = (1.0 if self.quick else 2.0) * (1 if length == 16 else 3)
            turns = 1 if self.late() else 3
            cell = self.minilm.measure(
                models, dtype, batch, length, budget=budget, cost=cost, turns=turns
            )
            self.cells.append(cell)
            bar.advance(task)
        batch, length = sizes[-1]
        if not self.late():
            self.memory[dtype] = {
                name: self.minilm.peak_memory(model, batch, length)
                for name, model in models.items()
                if name in self.cells[-1].times
            }
        self._ceiling(dtype)

    def _ceiling(self, dtype: torch.dtype) -> tuple[float, str] | None:
        """The ceiling of matmuls in a dtype; each call looks once more for the machine's best."""
        if not ceilings.available():
            return None
        fma, dot = ceilings.fma_gflops(), ceilings.dot_gflops()
        if dtype == torch.bfloat16 and dot > fma:
            return dot, ceilings.dot_name()
        return fma, "float32 FMA"

    # ---- report ---------------------------------------------------------------------------------

    def show_times(self) -> None:
        variants = self.minilm.VARIANTS
        limits = {dtype: self._ceiling(dtype) for dtype in self.minilm.DTYPES}
        self.out.print("\n[bold]Time of one forward pass[/] (median of turns ± spread)")
        body = table(
            "batch × tokens", "dtype", *variants, "× eager", "× sdpa", "of ceiling", right=2
        )
        for cell in self.cells:
            ours = cell.times[OURS]
            limit = limits[cell.dtype]
            share = "–"
            if limit is not None:
                share = f"{cell.flops / ours.median / 1e9 / limit[0]:.0%}"
            body.add_row(
                f"{cell.batch} × {cell.length}",
                dtype_name(cell.dtype),
                *[_time(cell, name) for name in variants],
                *[_gain(cell, name) for name in variants if name != OURS],
                share,
            )
        self.out.print(body)
        for cell in self.cells:
            for name, why in cell.left_out.items():
                where = f"{cell.batch} × {cell.length} {dtype_name(cell.dtype)}"
                self.out.print(f"[dim]{name} at {where}: {why}[/]")
        for dtype, limit in limits.items():
            if limit is not None:
                self.out.print(
                    f"[dim]ceiling in {dtype_name(dtype)}: {limit[0]:.0f} GFLOP/s, {limit[1]}, "
                    "measured in this run[/]"
                )
        ceilings_by_name = {dtype_name(d): limit[0] for d, limit in limits.items() if limit}
        self.results["ceilings"] = ceilings_by_name
        self.results["times"] = [_json_of(cell) for cell in self.cells]
        self.picture(ceilings_by_name)

    def show_memory(self) -> None:
        rows = [(d, peaks) for d, peaks in self.memory.items() if None not in peaks.values()]
        if not rows:
            return
        cell = self.cells[-1]
        self.out.print(
            f"\n[bold]Memory[/] that a forward pass of {cell.batch} × {cell.length} takes at its "
            "peak, beyond model and inputs"
        )
        body = table("dtype", *self.minilm.VARIANTS, right=1)
        for dtype, peaks in rows:
            shown = [peaks.get(name) for name in self.minilm.VARIANTS]
            body.add_row(
                dtype_name(dtype),
                *["–" if peak is None else f"{peak / 2**20:.0f} MiB" for peak in shown],
            )
        self.out.print(body)
        self.results["peak_bytes"] = {dtype_name(dtype): peaks for dtype, peaks in rows}

    def picture(self, limits: dict[str, float]) -> None:
        try:
            from ..benchmarks import chart

            text = f"{self.subtitle}. Bars: median; line: quartiles. Shorter is better."
            chart.draw(self.cells, limits, text, self.folder / "minilm.png")
        except ImportError:
            self.out.print("[dim]no picture: matplotlib is not installed[/]")

    def close(self) -> int:
        seconds = time.monotonic() - self.start
        self.results["seconds"] = seconds
        self.results["findings"] = self.findings
        self.out.print()
        for finding in self.findings:
            self.out.print(f"[red]finding[/]: {finding}")
        written = sorted(
            ["report.txt", "results.json", *(p.name for p in self.folder.glob("*.png"))]
        )
        self.out.print(f"{seconds:.0f} s; wrote {', '.join(written)} in {self.folder}/")
        text = json.dumps(self.results, indent=2, ensure_ascii=False)
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")
        plain = "\n".join(line.rstrip() for line in self.out.export_text().splitlines())
        (self.folder / "report.txt").write_text(plain + "\n", encoding="utf-8")
        return 1 if self.findings else 0


def _time(cell: Any, name: str) -> str:
    from ..benchmarks.chart import milliseconds

    timing = cell.times.get(name)
    return "–" if timing is None else f"{milliseconds(timing.median)} ±{timing.spread:.0%}"


def _gain(cell: Any, name: str) -> str:
    if name not in cell.times:
        return "–"
    gain = cell.times[name].median / cell.times[OURS].median
    return f"[{'green' if gain >= 1 else 'red'}]{gain:.2f}[/]"


def _json_of(cell: Any) -> dict[str, Any]:
    return {
        "batch": cell.batch,
        "tokens": cell.length,
        "dtype": dtype_name(cell.dtype),
        "flops": cell.flops,
        "variants": {
            name: {"seconds": t.median, "low": t.low, "high": t.high, "turns": t.turns}
            for name, t in cell.times.items()
        },
        "left_out": cell.left_out,
    }


def run(args: argparse.Namespace) -> int:
    """1 if the swapped model is not as exact as the original, or finds other sentences."""
    from ..benchmarks.minilm import DTYPES, SIZES, Missing, model_path

    folder = Path(args.out)
    try:
        model_path()
        folder.mkdir(parents=True, exist_ok=True)
    except Missing as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out: {folder} can't be made: {error.strerror}") from None
    demo = _Demo(args.quick, folder)
    demo.introduce()
    with progress() as bar:
        steps = len(DTYPES) * (len(SIZES) - args.quick)
        task = bar.add_task("loading", total=steps)
        for dtype in DTYPES:
            models, report = demo.swap(dtype)
            bar.update(task, description=f"verifying in {dtype_name(dtype)}")
            demo.verify(report, dtype)
            if dtype == torch.float32:
                bar.update(task, description="searching")
                demo.search(models)
                demo.out.print()
            demo.measure(models, dtype, bar, task)
            del models, report
    demo.show_times()
    demo.show_memory()
    return demo.close()


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "demo",
        "a real model before and after the swap: error, time, memory, the same search result",
        "  fasttransformer demo\n"
        "  fasttransformer demo --quick --out report; echo $?   # 1 if verification fails\n",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="the two smaller sizes, less time each"
    )
    files = "report.txt, results.json and minilm.png"
    parser.add_argument(
        "--out", default="demo-report", metavar="DIR", help=f"folder for {files} (demo-report)"
    )
    parser.set_defaults(run=run)
