"""The few things that bnkit asks of torch.distributed; all of them do nothing in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size(process_group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group (default: all); 1 where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError("This process is not in the process group that it was given: only members may take part.")
    return size


def rank(process_group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group (default: all); 0 where torch.distributed is not in use."""
    return dist.get_rank(process_group) if world_size(process_group) > 1 else 0


def all_gather(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's tensor (one shape and dtype on all ranks), in the order of the ranks, on the tensor's device."""
    if world_size(process_group) == 1:
        return [tensor]
    sent = tensor.detach().contiguous().to(_device_of(process_group))
    gathered = [torch.empty_like(sent) for _ in range(world_size(process_group))]
    dist.all_gather(gathered, sent, group=process_group)
    return [part.to(tensor.device) for part in gathered]


def all_gather_object(value: T, process_group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable object, in the order of the ranks."""
    if world_size(process_group) == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size(process_group)
    dist.all_gather_object(gathered, value, group=process_group)
    return cast("list[T]", gathered)


def all_gather_numbers(values: Sequence[float], process_group: dist.ProcessGroup | None = None) -> list[list[float]]:
    """Every rank's row of numbers, in the order of the ranks."""
    rows = all_gather(torch.tensor(values, dtype=torch.float64), process_group)
    return [row.tolist() for row in rows]


def _device_of(process_group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors the group's backend can send."""
    # Where no backend was named there is one for each device, the CPU's among them.
    if "nccl" in dist.get_backend(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
