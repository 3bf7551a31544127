"""The few things that bnkit asks of torch.distributed; all of them do nothing in a single process."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class UnreachableError(RuntimeError):
    """The other ranks do not answer any more, and have not said why."""


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
    with reaching():
        dist.all_gather(gathered, sent, group=process_group)
    return [part.to(tensor.device) for part in gathered]


def all_gather_object(value: T, process_group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable object, in the order of the ranks."""
    if world_size(process_group) == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size(process_group)
    with reaching():
        dist.all_gather_object(gathered, value, group=process_group)
    return cast("list[T]", gathered)


def all_gather_numbers(values: Sequence[float], process_group: dist.ProcessGroup | None = None) -> list[list[float]]:
    """Every rank's row of numbers, in the order of the ranks."""
    if world_size(process_group) == 1:
        return [[float(value) for value in values]]
    rows = all_gather(torch.tensor(values, dtype=torch.float64), process_group)
    return [row.tolist() for row in rows]


def broadcast(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensor of the group's first rank (one shape and dtype on all ranks)."""
    if world_size(process_group) == 1:
        return tensor
    sent = tensor.detach().to(_device_of(process_group), copy=True)
    with reaching():
        dist.broadcast(
            sent, 0 if process_group is None else dist.get_global_rank(process_group, 0), group=process_group
        )
    return sent.to(tensor.device)


@contextmanager
def reaching() -> Iterator[None]:
    """Say what it means when a collective fails, which the backend tells by sockets and files of its own."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors, all of them
        raise UnreachableError(
            "The other ranks do not answer: one of them has ended (an error of its own, or killed, as for want of "
            f"memory) or waits elsewhere. Look for the first error among the ranks' outputs. ({error})"
        ) from error


def agree(what: str, facts: Callable[[], Mapping[str, object]], process_group: dist.ProcessGroup | None = None) -> str:
    """See to it that all ranks find the same facts, in the same order, before they depend on each other.

    Args:
        what: what is given up otherwise, for the message.
        facts: what must be the same, each by its name in the message; may raise.
        process_group: the ranks; default: all.

    Returns:
        A random text, the same on all ranks.

    Raises:
        ValueError: on every rank, naming the first fact that differs.
        RuntimeError: where the facts of another rank could not be found.
    """
    failure: BaseException | None = None
    mine: dict[str, object] = {}
    try:
        mine = dict(facts())
    except BaseException as error:
        failure = error
    said = None if failure is None else _words(failure)
    rows = all_gather_object((said, mine, secrets.token_hex(8)), process_group)
    _raise_any(what, failure, [said for said, _, _ in rows])
    _, first, key = rows[0]
    for number, (_, other, _) in enumerate(rows):
        for name in [*first, *other]:
            here, there = first.get(name, "missing"), other.get(name, "missing")
            if here != there:
                raise ValueError(
                    f"The ranks disagree on {name}: {here} on rank 0, but {there} on rank {number}. "
                    "Build the same model and pass the same arguments on every rank."
                )
        moved = next((pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]), None)
        if moved:
            raise ValueError(
                f"The ranks disagree on the order: {moved[0]} on rank 0 stands where {moved[1]} does on rank {number}. "
                "Build the same model in the same order on every rank."
            )
    return key


def raise_together(what: str, failure: BaseException | None, process_group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if one has failed: there its own error, elsewhere one that says whose it was, and why.

    Every rank must call it; a rank that went on alone would wait for ever.
    """
    with preferring(failure):
        words = all_gather_object(None if failure is None else _words(failure), process_group)
    _raise_any(what, failure, words)


@contextmanager
def preferring(failure: BaseException | None) -> Iterator[None]:
    """Where the others cannot be told of this rank's failure, raise that and not that they do not answer."""
    try:
        yield
    except UnreachableError:
        if failure is not None:
            raise failure from None
        raise


@contextmanager
def leaving_word(what: str, key: str, process_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let a rank that fails alone tell the others why; they hear of it when its process ends, and their waiting.

    Args:
        what: what is given up, for the message.
        key: of this call, the same on all ranks.
        process_group: the ranks; default: all.
    """
    if world_size(process_group) == 1:
        yield
        return
    key = f"bnkit/failed/{key}"
    try:
        yield
    except UnreachableError as error:
        said = ""
        with suppress(Exception):  # the store may be gone too: then the error stays as it is
            store = dist.distributed_c10d._get_default_store()
            said = store.get(key).decode() if store.check([key]) else ""
        if said:
            _give_up(what, said, error)
        raise
    except BaseException as error:
        with suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            store.set(key, f"rank {rank(process_group)} failed: {_words(error)}")
        raise


def _raise_any(what: str, failure: BaseException | None, words: Sequence[str | None]) -> None:
    if failure is not None:
        raise failure
    for number, said in enumerate(words):
        if said is not None:
            _give_up(what, f"rank {number} failed: {said}")


def _give_up(what: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise RuntimeError(f"{what} was given up on this rank, with nothing changed, because {reason}") from cause


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _device_of(process_group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors the group's backend can send."""
    # Where no backend was named there is one for each device, the CPU's among them.
    if "nccl" in dist.get_backend(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
