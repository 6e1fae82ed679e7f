"""One process, or several that share each step's batch, by accelerate.

Every process draws the same batch and takes its part; gradients are summed, so that several
processes compute what one would with all of the batch. Each has the whole model (DDP), or, sharded,
between the steps its part of the weights, gradients and the optimizer's state (FSDP2).

Source of the latter: Zhao et al., PyTorch FSDP, 2023 (arXiv:2304.11277).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


class Devices:
    """One process; what several have in another way is a method here.

    Attributes:
        rank, world: number of this process, and of all.
        device: its device.
        sharded: every forward pass is one of all processes together.
    """

    rank, world = 0, 1
    sharded = False

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def prepare(self, model: nn.Module) -> Any:
        """The model as training calls it."""
        return model.to(self.device)

    def whole(self, state: Any) -> Any:
        """A state dict, of model or optimizer, with whole tensors; of all processes together."""
        return state

    def parts(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's whole state dict as this process loads it."""
        return state

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

    def whole(self, state: Any) -> Any:
        """A state dict, of model or optimizer, with whole tensors; of all processes together."""
        return state

    def parts(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's whole state dict as this process loads it."""
        return state

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


class ShardedDevices(SeveralDevices):
    """The same, sharded by torch's FSDP2.

    A model is one group of weights: a layer here also runs the norm of the layer after it, which
    would not be there if each layer were gathered apart. So between the steps a process has its
    part, and within a step all weights.

    torch's own ``fully_shard`` and not accelerate's plugin, which calls it: accelerate 1.15 takes
    the plugin on GPUs alone (AcceleratorState leaves MULTI_CPU as it is, and has no
    ``fsdp_plugin``), and gloo processes are where this can be tested.
    """

    sharded = True

    def prepare(self, model: nn.Module) -> Any:
        mesh = init_device_mesh(self.device.type, (self.world,))
        return fully_shard(model.to(self.device), mesh=mesh)

    @contextlib.contextmanager
    def local(self, model: Any) -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def whole(self, state: Any) -> Any:
        return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)

    def parts(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def part(value: Any, like: Any) -> Any:
            # Step counts have no dimensions, and stay whole.
            if not isinstance(value, Tensor) or not value.dim():
                return value
            return distribute_tensor(value.to(self.device), like.device_mesh, like.placements)

        own = {
            number: {name: part(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": own}


def devices(device: str, shard: bool = False) -> Devices:
    """By what torchrun left in the environment.

    Raises:
        ImportError: several processes, and accelerate is not installed.
        ValueError: ``shard`` in one process.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shard and not several:
        raise ValueError("shard needs several processes: torchrun --nproc-per-node N …")
    if not several:
        return Devices(device)
    return ShardedDevices(device) if shard else SeveralDevices(device)
