"""What differs between one process and many: who am I, means over the global batch, gathering of results."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils import UserError, first_line

logger = logging.getLogger(__name__)

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


def pick_device(local_rank: int | None = None) -> torch.device:
    """This process's GPU where there is one that torch can use, else the CPU; a GPU left unused is warned of.

    Args:
        local_rank: number of this process on its machine, where the launcher does not tell it (`LOCAL_RANK`).

    Raises:
        UserError: this machine has more processes than GPUs.
    """
    if not torch.cuda.is_available():
        if (reason := _why_no_gpu()) is not None:
            logger.warning(
                "on the CPU: this machine has a GPU, but torch %s cannot use it (%s)", torch.__version__, reason
            )
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", local_rank or 0)), torch.cuda.device_count()
    if rank >= gpus:
        raise UserError(f"process {rank + 1} of this machine has no GPU, there are {gpus}; lower --nproc_per_node")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _why_no_gpu() -> str | None:
    """What keeps torch from the GPU of this machine; None where it has none, or where the user hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not _has_gpu():
        return None
    if not torch.backends.cuda.is_built():
        return "it is built without CUDA: install another build"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # the driver is too old for this build, or broken
        return first_line(error)
    return "CUDA finds no device"


def _has_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU, usable or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def start(device_type: str, *, timeout: timedelta = PROCESS_GROUP_TIMEOUT) -> Process:
    """Join the process group that `torchrun` describes in the environment: NCCL on GPUs, Gloo on CPUs.

    Args:
        timeout: how long a process waits for the others before it gives up.
    """
    if "RANK" not in os.environ or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and "MASTER_ADDR" not in os.environ):
        return Process()
    if not dist.is_initialized():
        # Gloo always, for objects and flags that live on the host; NCCL for the tensors of a GPU.
        backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
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


def synchronized(model: nn.Module, wanted: bool, device: torch.device) -> nn.Module:
    """The network with batch norms that take their statistics over all processes, where that is wanted."""
    if not wanted or not is_distributed():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        setattr(model, name, _on_host(child) if isinstance(child, _BatchNorm) else synchronized(child, wanted, device))
    return model


class HostSyncBatchNorm(_BatchNorm):
    """Batch norm over all processes for tensors on the host, which torch's own refuses."""

    def _check_input_dim(self, values: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, values: Tensor) -> Tensor:
        """`values` (N, C, ...) of this process -> the same, normalised with statistics over the global batch."""
        if not self.training:
            return super().forward(values)
        shape = (1, -1, *[1] * (values.dim() - 2))
        axes = [axis for axis in range(values.dim()) if axis != 1]
        wide = values.float()
        count = summed(torch.tensor(float(values.numel() // values.shape[1])))
        mean = summed(wide.sum(axes)) / count  # (C,)
        centred = wide - mean.view(shape)
        variance = summed(centred.square().sum(axes)) / count  # (C,)
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        normalised = centred * scale.view(shape)
        return (normalised if self.bias is None else normalised + self.bias.view(shape)).to(values.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _on_host(norm: _BatchNorm) -> HostSyncBatchNorm:
    """The same batch norm, its parameters and buffers under their names."""
    twin = HostSyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, track_running_stats=norm.track_running_stats
    )
    twin._parameters, twin._buffers = norm._parameters, norm._buffers
    return twin.train(norm.training)


class _Summed(torch.autograd.Function):
    """Sum over the processes. Every process's loss depends on it, so the gradients are summed as well."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def summed(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes, with a gradient."""
    return _Summed.apply(values) if is_distributed() else values


def batch_mean(total: Tensor, count: Tensor, whole: Tensor | None = None) -> Tensor:
    """Mean over the global batch, 0 where nothing counts: `total` and `count` are this process's sum and number.

    With several processes the result is scaled so that its average over the processes is the mean over the global batch
    (distributed data parallelism averages gradients): the number of processes changes neither loss nor gradient.

    Args:
        whole: the number in the whole global batch, of which this is a part that is accumulated; None: `count` is all
            of this process's, and is summed over the processes here.
    """
    if whole is None:
        whole = counted(count)
    if is_distributed():
        total = total * dist.get_world_size()
    return total / whole.clamp(min=1)


def counted(count: Tensor) -> Tensor:
    """Sum of a number, or of a vector of them, over the processes; no gradient."""
    if is_distributed():
        count = count.detach().clone()
        dist.all_reduce(count)
    return count


def average(values: Tensor) -> Tensor:
    """Average of a tensor over the processes."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def average_buffers(buffers: list[Tensor]) -> None:
    """Put the average over the processes into each of some tensors, in one message."""
    if is_distributed() and buffers:
        put_back(average(flattened(buffers)), buffers)


def flattened(tensors: list[Tensor]) -> Tensor:
    """The numbers of some float tensors in one vector: one kernel of a GPU, one message, where each had its own."""
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def put_back(values: Tensor, tensors: list[Tensor]) -> None:
    """Fill the tensors from a vector of the form that `flattened` gives."""
    parts = values.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


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


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process go through the block before the others do, which then find its files (indices)."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
