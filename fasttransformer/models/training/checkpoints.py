"""All of a run in one file, replaced as a whole: a crash leaves the last one that was complete."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tokenizer import write_atomically

FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """A run after ``step`` steps.

    Attributes:
        step: steps done; batches are numbered by it, so it is the position in the data as well,
            and the schedule's.
        options: the run's options.
        records: digest of the records that it trains on.
        model, optimizer: state dicts.
        random: each process's states of random number generators.
        best: loss and step of the best evaluation, None before the first.
        worse: evaluations since then.
        log: what was measured so far.
        seconds, cpu_seconds: that training took, wall clock and of all threads.
    """

    step: int
    options: dict[str, Any]
    records: str
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: list[dict[str, Tensor]]
    best: tuple[float, int] | None = None
    worse: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Writes ``checkpoint.pt``."""
        memory = io.BytesIO()
        # dataclasses.asdict would copy every tensor.
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, memory)
        write_atomically(folder / FILE, memory.getvalue())

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """What :meth:`save` wrote; None where there is nothing.

        Raises:
            ValueError: the file is no checkpoint.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises whatever unpickling does
            raise ValueError(f"{path} is not a checkpoint of a run: {error}") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of this process's generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Makes the generators go on from a saved state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
