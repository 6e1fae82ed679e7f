"""One process, or several that share each step's batch, by accelerate.

Every process draws the same batch and takes its part; gradients are summed, so that several
processes compute what one would with all of the batch.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn


class Devices:
    """One process; what several have in another way is a method here.

    Attributes:
        rank, world: number of this process, and of all.
        device: its device.
    """

    rank, world = 0, 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def prepare(self, model: nn.Module) -> Any:
        """The model as training calls it."""
        return model.to(self.device)

    def local(self, model: Any) -> Any:
        """A context in which backward does not sum over processes."""
        return contextlib.nullcontext()

    def sum(self, value: float) -> float:
        """Of all processes' values."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """All processes' values, by rank."""
        return [value]

    def wait(self) -> None:
        """Until all processes are here."""

    def close(self) -> None:
        """Ends the work of several processes together."""


class SeveralDevices(Devices):
    """The processes that torchrun started; gloo on CPUs, NCCL on GPUs."""

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError(
                "training in several processes needs accelerate: "
                "pip install 'fasttransformer[train]'"
            ) from error
        self.accelerator: Any = Accelerator(cpu=device == "cpu")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device

    def prepare(self, model: nn.Module) -> Any:
        return self.accelerator.prepare_model(model)

    def local(self, model: Any) -> Any:
        return self.accelerator.no_sync(model)

    def sum(self, value: float) -> float:
        one = torch.tensor(value, dtype=torch.float64, device=self.device)
        total: Tensor = self.accelerator.reduce(one, "sum")
        return float(total)

    def gather(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def devices(device: str) -> Devices:
    """By what torchrun left in the environment.

    Raises:
        ImportError: several processes, and accelerate is not installed.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return SeveralDevices(device) if several else Devices(device)
