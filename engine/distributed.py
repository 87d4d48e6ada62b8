"""One process or many: the process group, means over the global batch, gathering of results."""

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, first_line

logger = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)  # other ranks may wait for the first evaluation of a large set


@dataclass(frozen=True)
class Process:
    """The place of this process among `world_size`; a plain `python main.py` is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this is the one process that writes files."""
        return self.rank == 0


def pick_device(local_rank: int | None = None, *, name: torch.device | str | None = None) -> torch.device:
    """Return the device that is named, else this process's GPU where torch can use one, else the CPU.

    Logs a warning if there is a GPU that torch cannot use.

    Args:
        local_rank: number of this process on its machine, where the launcher does not tell it (`LOCAL_RANK`); without
            both, torch's current GPU is taken.

    Raises:
        UserError: this machine has more processes than GPUs, or the named device cannot be used.
    """
    if name is not None:
        try:
            torch.zeros(1, device=name).item()  # a meta device has nothing to read
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {name}: not usable ({first_line(error)}); give cpu or cuda") from error
    if not torch.cuda.is_available():
        if _has_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # torch names an old driver itself
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            logger.warning("on the CPU: torch %s (%s) cannot use this machine's GPU", torch.__version__, built)
        return torch.device("cpu")
    number, gpus = os.environ.get("LOCAL_RANK", local_rank), torch.cuda.device_count()
    rank = torch.cuda.current_device() if number is None else int(number)
    if rank >= gpus:
        raise UserError(f"process {rank + 1} of this machine has no GPU, there are {gpus}; lower --nproc_per_node")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _has_gpu() -> bool:
    """Return whether the system has an NVIDIA GPU, usable or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def start(device_type: str, *, timeout: timedelta = PROCESS_GROUP_TIMEOUT) -> Process:
    """Join the process group that `torchrun` describes in the environment: NCCL on GPUs, Gloo on CPUs.

    Args:
        timeout: how long a process waits for the others before it fails.
    """
    if "RANK" not in os.environ or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and "MASTER_ADDR" not in os.environ):
        return Process()
    if not dist.is_initialized():
        # Gloo always, for objects and flags that live on the host; NCCL for the tensors of a GPU.
        backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    return Process(dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Return whether this process belongs to a group; under torchrun a single process has one, too."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Return whether this process is the one that writes files."""
    return not is_distributed() or dist.get_rank() == 0


def parallel(network: nn.Module, device: torch.device, *, find_unused_parameters: bool) -> nn.Module:
    """Return the network in parallel with those of the other processes, if this one belongs to a group.

    Running statistics are not synchronised, since no training step uses them.
    """
    if not is_distributed():
        return network
    # A 1x1 kernel's gradient may have other strides than its weight, of the same order in memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed a parameter
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        **{sync_buffers: False},
    )


def synchronized(model: nn.Module, wanted: bool) -> nn.Module:
    """Return the network; if `wanted`, its batch norms use the statistics of all processes."""
    if wanted and is_distributed():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(_BatchNorm):
    """Batch norm that trains with the statistics of the global batch.

    torch's own rejects CPUs, and makes a GPU wait three times to leave out processes without samples; here every
    process has samples. It takes one message forward and one backward.
    """

    def _check_input_dim(self, values: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, values: Tensor) -> Tensor:
        """Normalise this process's `values` (N, C, ...) with the statistics of the global batch."""
        if not self.training:
            return super().forward(values)
        axes = [axis for axis in range(values.dim()) if axis != 1]
        own_variance, own_mean = torch.var_mean(values.float(), axes, correction=0)  # (C,)
        own = torch.cat([own_mean, own_variance, own_mean.new_full((1,), values.numel() // values.shape[1])])
        places = [own if rank == dist.get_rank() else torch.zeros_like(own) for rank in range(dist.get_world_size())]
        means, variances, counts = _Sum.apply(torch.stack(places)).split([len(own_mean), len(own_mean), 1], dim=1)
        count = counts.sum(0)  # (1,)
        mean = (means * counts).sum(0) / count  # (C,)
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_((variance * count / (count - 1).clamp(min=1)).detach(), self.momentum)
        scale = (variance + self.eps).rsqrt()
        along_channels = [-1, *[1] * (values.dim() - 2)]
        each_channel = scale * self.weight, self.bias - mean * scale * self.weight
        factor, offset = (each.view(along_channels) for each in each_channel)
        return torch.addcmul(offset, values, factor).to(values.dtype)


class _Sum(torch.autograd.Function):  # torch's own all_reduce with a gradient cannot be compiled
    """Sums a tensor over the processes in the forward pass, and its gradient in the backward pass."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return counted(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return counted(gradient)


def batch_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean over the global batch, 0 if it is empty, from this process's sum and the whole batch's number.

    With several processes the result is scaled so that its average over them is the mean over the global batch, because
    data parallelism averages gradients: the number of processes changes neither loss nor gradient.
    """
    if is_distributed():
        total = total * dist.get_world_size()
    return total / count.clamp(min=1)


def counted(count: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, without gradient."""
    if is_distributed():
        count = count.detach().clone()
        dist.all_reduce(count)
    return count


def summed(
    parts: Sequence[Mapping[str, Tensor]], over_processes: Callable[[Tensor], Tensor] = counted
) -> dict[str, Tensor]:
    """Return the float32 sum of each name over the parts of a batch and then, with one message for all, over processes.

    Args:
        over_processes: `counted`, their sum, or `average`, their mean.
    """
    names = list(parts[0])
    sums = torch.stack([torch.stack([each[name].float() for name in names]) for each in parts]).sum(0)
    return dict(zip(names, over_processes(sums).unbind(), strict=True))


def average(values: Tensor) -> Tensor:
    """Return the average of a tensor over the processes."""
    return counted(values) / dist.get_world_size() if is_distributed() else values


def average_buffers(buffers: list[Tensor]) -> None:
    """Replace each tensor by its average over the processes, with one message for all."""
    if is_distributed() and buffers:
        put_back(average(flattened(buffers)), buffers)


def flattened(tensors: list[Tensor]) -> Tensor:
    """Return the numbers of float tensors in one vector, so that one kernel or message handles all."""
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def put_back(values: Tensor, tensors: list[Tensor]) -> None:
    """Fill the tensors from a vector that `flattened` returned."""
    parts = values.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all processes in order of rank, on every process; all must call it."""
    if not is_distributed():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block before the others, which then find its files (indices)."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
