"""Putting a loader's batch through a model: the default forward, and the errors that say how to replace it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Forward", "default_forward", "feed", "known_samples_in", "samples_in"]

Forward = Callable[[nn.Module, Any], Any]

_CURE = "pass forward=, such as forward=lambda model, batch: model(batch[0])"


def feed(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    """Run the model on a batch, by the user's ``forward`` or by the default one.

    Raises:
        TypeError: where the default forward cannot feed this batch to this model.
        ValueError: where a layer of the model is left with a single value per channel.
    """
    try:
        (forward or default_forward)(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"Batch {index} leaves a BatchNorm layer with a single value per channel, which has no variance: "
            f"use a larger batch size, or drop_last=True ({error})."
        ) from error


def samples_in(batch: Any) -> int:
    """Number of samples in a batch, see ``known_samples_in``; 1 where it is not known."""
    return known_samples_in(batch) or 1


def known_samples_in(batch: Any) -> int | None:
    """Number of samples in a batch: the first dimension of the first tensor in it; None where there is none."""
    found = _first_tensor(batch)
    return None if found is None else len(found)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Feed a tensor, the first item of a tuple or list, or a dict as keyword arguments, moved to the model's device.

    Raises:
        TypeError: for another kind of batch, or where the model does not take it so.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor | Mapping):
        raise TypeError(f"There is no default forward for a batch that is a {_kind(batch)}: {_CURE}.")
    first = next(chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if first is None else first.device
    try:
        if isinstance(inputs, Tensor):
            return model(inputs.to(device))
        return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()})
    except (TypeError, NotImplementedError) as error:
        what = f"the keywords {sorted(map(str, inputs))}" if isinstance(inputs, Mapping) else "one tensor"
        raise TypeError(
            f"A batch (a {_kind(batch)}) was fed to {type(model).__name__} as {what}, and that failed: {error}. "
            f"If the model wants it otherwise, {_CURE}."
        ) from error


def _kind(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__} of {', '.join(type(item).__name__ for item in batch) or 'nothing'}"
    return type(batch).__name__


def _first_tensor(value: Any, depth: int = 4) -> Tensor | None:
    """The first tensor with a dimension in nested containers, and in an object's attributes."""
    if isinstance(value, Tensor):
        return value if value.ndim else None
    if depth == 0 or isinstance(value, str | bytes):
        return None
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, tuple | list):
        items = list(value)
    else:
        slots = [field.name for field in fields(value)] if is_dataclass(value) else []
        items = [getattr(value, name) for name in slots] or list(getattr(value, "__dict__", {}).values())
    return next((found for item in items if (found := _first_tensor(item, depth - 1)) is not None), None)
