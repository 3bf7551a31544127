"""The process groups that synchronized layers share: made once, on every rank alike, and never held by a layer."""

from __future__ import annotations

from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bnkit.ranks import reaching

__all__ = ["gather", "is_distributed", "reduce_sum", "subgroup"]

_made: dict[int, tuple[ref[ProcessGroup], ref[ProcessGroup]]] = {}
"""Ranks a group -> (the world that the groups are part of, the group that this rank is in).

Torch keeps them alive until ``destroy_process_group``, and nothing here keeps them longer.
"""


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def subgroup(size: int | None) -> ProcessGroup | None:
    """The group of ``size`` consecutive ranks that this rank is in; None where it is alone.

    The first call for a size makes the groups, which all ranks must take part in; later calls look them up, also
    after a deepcopy or in another layer. A new world (``init_process_group`` once more) makes new ones.

    Raises:
        ValueError: where the world cannot be cut into groups of that size.
    """
    if size == 1 or not is_distributed():
        return None
    world = dist.group.WORLD
    ranks = dist.get_world_size()
    if world is None or size is None or size == ranks:
        return world
    if ranks % size:
        raise ValueError(f"{ranks} ranks cannot be cut into groups of {size}: choose a divisor of {ranks}.")
    made_in, made = (found() for found in _made[size]) if size in _made else (None, None)
    if made is not None and made_in is world:
        return made
    mine = world
    for first in range(0, ranks, size):  # every rank makes every group, in the same order
        group = dist.new_group(list(range(first, first + size)))
        if first <= dist.get_rank() < first + size:
            mine = group
    _made[size] = (ref(world), ref(mine))
    return mine


def gather(row: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's row as the rows of a matrix, in one collective: the same bits on every rank."""
    sent = row.contiguous().to(_device(group, row))
    rows = sent.new_empty(dist.get_world_size(group), len(sent))
    with reaching():
        dist.all_gather(list(rows.unbind()), sent, group=group)
    return rows.to(row.device)


def reduce_sum(row: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every rank's row."""
    total = row.to(_device(group, row), copy=True)
    with reaching():
        dist.all_reduce(total, group=group)
    return total.to(row.device)


def _device(group: ProcessGroup, row: Tensor) -> torch.device:
    """The device whose tensors the group's backend can send."""
    return row.device if "nccl" in dist.get_backend(group) else torch.device("cpu")
