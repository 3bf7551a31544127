"""What synchronized BatchNorm costs over plain BatchNorm and the sending itself, in real processes."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

import bnkit
from bnkit.benchmarks.memory import peaks
from bnkit.benchmarks.models import backward_of
from bnkit.benchmarks.result import Goal, Result, Row, rows
from bnkit.benchmarks.timing import CLOCKS, Ratio, Timings, synchronize
from bnkit.norms import Sync

__all__ = ["FLOOR", "TORCH", "measure"]

FLOOR = "torch BatchNorm and an all-reduce of as many bytes"
TORCH = "torch SyncBatchNorm"
BNKIT = "bnkit Sync"


def measure(
    *,
    processes: Sequence[int],
    shapes: Sequence[Sequence[int]],
    calls: int,
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Time a layer's forward and backward in several processes at a time.

    Args:
        processes: how many, of each setting.
        shapes: of each process's input.
        calls: forwards and backwards in one measurement.
        rounds: measurements of each.
        device: "cpu": gloo. "cuda": NCCL where each process has a device of its own, otherwise gloo on the first.
        seed: of inputs and order.
    """
    table: list[Row] = []
    missing: dict[str, str] = {}
    backend = _backend(device, max(processes))
    for world in processes:
        for shape in shapes:
            arguments = (tuple(shape), calls, rounds, device, backend, seed)
            timings, memory, errors = _together(_started(world, arguments))
            missing |= errors
            goal = {BNKIT: Goal("wall", 1.5)}
            what = f"{world} processes ({backend}), {tuple(shape)}"
            table += rows(what, timings, memory, goals=goal)
            if TORCH in timings.cpu:
                found: dict[str, Ratio] = {clock: timings.ratio(BNKIT, clock, TORCH) for clock in CLOCKS}
                table.append(Row(what, BNKIT, TORCH, found, Goal("wall", 1.05)))
    return Result(
        "sync",
        device,
        "Forward and backward of one layer whose processes normalise by the batch of all of them, over plain BatchNorm "
        "together with one all-reduce forward (2C + 1 doubles) and one backward (2C doubles).",
        rounds,
        table,
        ["CPU time and memory: the sum of all processes. Wall time: the slowest process's."],
        missing,
    )


def _started(world: int, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    """What each process has measured."""
    with tempfile.TemporaryDirectory() as folder:
        # Spawned: OpenMP's threads, and a CUDA context, do not survive a fork.
        start_processes(_main, (world, folder, *arguments), world)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]


def _together(found: Sequence[Mapping[str, Any]]) -> tuple[Timings, dict[str, int], dict[str, str]]:
    """One measurement of all processes' measurements."""

    def merged(clock: str, merge: Callable[[Sequence[float]], float]) -> dict[str, list[float]]:
        return {
            name: [merge(each) for each in zip(*(one[clock][name] for one in found), strict=True)]
            for name in found[0][clock]
        }

    memory = {name: sum(one["memory"][name] for one in found) for name in found[0]["memory"]}
    return Timings(FLOOR, merged("cpu", sum), merged("wall", max)), memory, found[0]["missing"]


def _main(
    rank: int,
    world: int,
    folder: str,
    shape: tuple[int, ...],
    calls: int,
    rounds: int,
    device: str,
    backend: str,
    seed: int,
) -> None:
    """One process: the same candidates in the same random order as the others, all starting together."""
    torch.set_num_threads(1)
    if device != "cpu":
        device = f"cuda:{rank if backend == 'nccl' else 0}"
        torch.cuda.set_device(device)
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    torch.manual_seed(seed + rank)
    candidates, missing = _candidates(torch.randn(*shape, device=device), calls)
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed).shuffle
    for counted in range(-1, rounds):
        shuffle(order)
        for name in order:
            synchronize(device)
            dist.barrier()
            cpu_began, wall_began = time.process_time(), time.perf_counter()
            candidates[name]()
            synchronize(device)
            if counted >= 0:
                cpu[name].append(time.process_time() - cpu_began)
                wall[name].append(time.perf_counter() - wall_began)
    memory = peaks(candidates, device)
    torch.save({"cpu": cpu, "wall": wall, "memory": memory, "missing": missing}, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _candidates(x: Tensor, calls: int) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    plain, synchronized = (_layer(x) for _ in range(2))
    bnkit.swap(nn.Sequential(synchronized), Sync())
    forward, backward = (torch.zeros(2 * x.shape[1] + more, dtype=torch.float64, device=x.device) for more in (1, 0))
    once = backward_of(plain, x)

    def floor() -> None:
        for _ in range(calls):
            once()
            dist.all_reduce(forward)
            dist.all_reduce(backward)

    candidates: dict[str, Callable[[], None]] = {FLOOR: floor, BNKIT: backward_of(synchronized, x, calls)}
    if not x.is_cuda:
        return candidates, {TORCH: "it runs on GPUs only"}
    candidates[TORCH] = backward_of(nn.SyncBatchNorm(x.shape[1], device=x.device).train(), x, calls)
    return candidates, {}


def _layer(x: Tensor) -> nn.Module:
    layer = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    return layer(x.shape[1], device=x.device).train()


def _backend(device: str, processes: int) -> str:
    return "nccl" if device != "cpu" and torch.cuda.device_count() >= processes else "gloo"
