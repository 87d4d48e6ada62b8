"""What differs between one process and many: who am I, means over the global batch, gathering of results."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)  # the first evaluation of a large set may keep the other ranks waiting


@dataclass(frozen=True)
class Process:
    """This process among `world_size`; one process of a plain `python main.py` is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Only this one writes files."""
        return self.rank == 0


def start(device_type: str) -> Process:
    """Join the process group that `torchrun` describes in the environment: NCCL on GPUs, Gloo on CPUs."""
    if "RANK" not in os.environ or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and "MASTER_ADDR" not in os.environ):
        return Process()
    if not dist.is_initialized():
        # Gloo always, for objects and flags that live on the host; NCCL for the tensors of a GPU.
        backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT)
    return Process(dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), dist.get_world_size())


def stop() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return not is_distributed() or dist.get_rank() == 0


def synchronized(model: nn.Module, wanted: bool) -> nn.Module:
    """The network with batch norms that take their statistics over all processes, where that is wanted."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if wanted and is_distributed() else model


def batch_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over the global batch, 0 where nothing counts: `total` and `count` are this process's sum and number.

    With several processes the result is scaled so that its average over the processes is the mean over the global batch
    (distributed data parallelism averages gradients): the number of processes changes neither loss nor gradient.
    """
    if is_distributed():
        count = count.detach().clone()
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / count.clamp(min=1)


def average(values: Tensor) -> Tensor:
    """Average of a tensor over the processes."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must call it."""
    if not is_distributed():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes in order of rank, on every process."""
    if not is_distributed():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
