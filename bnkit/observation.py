"""observe(): what each BatchNorm layer normalised, read from the layer itself where it has computed it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.layers import batch_norm_layers, keeps_forward, tracks_statistics
from bnkit.moments import Moments, to_float64
from bnkit.preservation import undoing

__all__ = ["Glance", "Observation", "Reading", "Record", "Source", "eager", "observe", "reading", "reduced"]

Source = Literal["layer", "input"]


class Reading(NamedTuple):
    """What one call of a layer normalised, still on the layer's device."""

    source: Source
    values: int  # per channel, on this rank
    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    group_size: int  # ranks whose values are in mean and var: more than 1 for a synchronized layer
    bias: float = 1.0  # var times this is the biased variance; kept apart, to multiply by once for all layers

    def moments(self) -> Moments:
        """As Moments. A synchronized batch is in every rank's reading: each rank claims its share of it."""
        var = (self.var * self.bias).clamp_min(0)
        return Moments(self._scalar(self.values), self.mean, var, batches=self._scalar(1 / self.group_size))

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)


Record = Callable[[str, Reading, Tensor], None]
Glance = Callable[[str, _BatchNorm, Tensor], bool]


class Observation(dict[str, Moments]):
    """Layer name -> Moments of the forwards since entry; a layer that was not reached has no entry.

    Attributes:
        sources: layer name -> ``"layer"`` (read from the layer's own batch statistics) or ``"input"`` (reduced from its
            input). Where both occurred, the last.
        unseen: names of the BatchNorm layers that were not reached (yet).
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.sources: dict[str, Source] = {}
        self._names = names

    @property
    def unseen(self) -> list[str]:
        """Names of the BatchNorm layers that no forward has reached since entry."""
        return [name for name in self._names if name not in self]


@contextmanager
def observe(model: nn.Module, *, exact: bool = False) -> Iterator[Observation]:
    """Observe what every BatchNorm layer normalises during the forwards inside the ``with`` block.

    In training mode a layer computes its batch's statistics: they are read from what autograd saved of them, and cost
    nothing to speak of. Where nothing was saved (evaluation mode, ``torch.no_grad()``, activation checkpointing,
    statistics of half precision, a synchronized layer, a subclass with a forward of its own) the layer's input is
    reduced in float64, with the channels in dimension 1. A subclass that takes something else is left unseen.
    ``.sources`` says which was used. A compiled model runs eagerly inside the block, since hooks do not reach compiled
    code. Forwards that activation checkpointing repeats during the backward pass are not counted again.

    The model is left as it is: running statistics, modes and random states are those of a run without observation.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        exact: reduce every layer's input, also where the layer's own statistics could be read.

    Yields:
        A dict of layer name -> [`bnkit.Moments`][] of all forwards since entry, this rank's share; pool over ranks with
        [`Moments.all_reduce`][bnkit.Moments.all_reduce].

    Raises:
        TypeError: for a scripted model.
        ValueError: for a model with lazy layers.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> with observe(model) as seen:
        ...     _ = model(torch.randn(32, 4))
        >>> seen["1"].count.item(), seen.sources["1"]
        (32.0, 'layer')
    """
    layers = batch_norm_layers(model)
    seen = Observation(tuple(layers))

    def record(name: str, read: Reading, _: Tensor) -> None:
        moments = read.moments()
        seen[name] = seen[name] + moments if name in seen else moments
        seen.sources[name] = read.source

    with eager(), reading(layers, record, by_input=lambda _: exact):
        yield seen


@contextmanager
def reading(
    layers: Mapping[str, _BatchNorm],
    record: Record,
    *,
    by_input: Callable[[str], bool] = lambda _: False,
    before: Callable[[str], None] | None = None,
    glance: Glance | None = None,
) -> Iterator[None]:
    """Call ``record`` with a ``Reading`` after every call of these layers, until the block ends.

    Args:
        layers: the layers by name.
        record: called with the layer's name, what it normalised, and its input.
        by_input: asked at every call: reduce this layer's input, even if its own statistics could be read?
        before: called with the layer's name before every call, repeated and failing ones too. Default: nothing.
        glance: asked after every call, with the layer's name, the layer and its input: is it enough to know that it was
            called with this? Then that call is not recorded. Default: never.
    """
    hooks = {name: _hook(name, record, by_input, glance) for name in layers}
    pre_hooks = {} if before is None else {name: _pre_hook(name, before) for name in layers}

    def undo() -> None:
        # By the function, not by its handle: Ctrl-C may come between a registration and the handle's assignment.
        for name, layer in layers.items():
            for key in [key for key, hook in layer._forward_hooks.items() if hook is hooks[name]]:
                layer._forward_hooks_with_kwargs.pop(key, None)
                layer._forward_hooks.pop(key)
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is pre_hooks.get(name)]:
                layer._forward_pre_hooks.pop(key)

    with undoing(undo):
        for name, layer in layers.items():
            if name in pre_hooks:
                layer.register_forward_pre_hook(pre_hooks[name])
            # First among the layer's hooks: another may replace the output.
            layer.register_forward_hook(hooks[name], with_kwargs=True, prepend=True)
        yield


def _pre_hook(name: str, before: Callable[[str], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda *_: before(name)


def _hook(
    name: str, record: Record, by_input: Callable[[str], bool], glance: Glance | None
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        x = args[0] if args else kwargs.get("input")
        if _in_backward() or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != layer.num_features:
            return  # repeated by activation checkpointing, or nothing that can be known
        if x.numel() == 0 or (glance is not None and glance(name, layer, x)):
            return
        record(name, _read(layer, x, output, by_input(name)), x)

    return hook


def eager() -> AbstractContextManager[Any]:
    """Run compiled models eagerly inside the block, without a recompilation afterwards.

    Hooks that are added after a module's first compiled call never fire; in eager mode they do.
    """
    # Nothing has been compiled where dynamo, slow to import, has not been imported.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def reduced(x: Tensor) -> Reading:
    """A reading of the input itself, in float64."""
    moments = Moments.of(x)
    return Reading("input", x.numel() // x.shape[1], moments.mean, moments.var, 1)


@torch.no_grad()
def _read(layer: _BatchNorm, x: Tensor, output: Any, by_input: bool) -> Reading:
    """What this call of the layer normalised."""
    own = None if by_input else _own_statistics(layer, output)
    if own is None:
        return reduced(x)
    mean, var, unbiased = own
    values = x.numel() // x.shape[1]
    size = ranks.world_size(layer.process_group) if isinstance(layer, nn.SyncBatchNorm) else 1
    return Reading("layer", values, mean, var, size, 1 - 1 / (values * size) if unbiased else 1.0)


def _own_statistics(layer: _BatchNorm, output: Any) -> tuple[Tensor, Tensor, bool] | None:
    """Mean, variance and whether that is unbiased, where the call has left its batch's statistics to be read."""
    if not (layer.training and keeps_forward(layer)):
        return None
    if tracks_statistics(layer) and layer.momentum == 1:
        # The update kept nothing of what was there before. The next call will overwrite it: copy.
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var, unbiased = layer.running_mean.clone(), layer.running_var.clone(), True
    else:
        # What autograd saved for the backward pass. (The step of the running average would tell too, but what a batch
        # adds to it drowns in its rounding where the batch's variance is small beside the average.) Under hooks on
        # what is saved, as in activation checkpointing, looking at it would recompute the forward.
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        saved = [getattr(getattr(output, "grad_fn", None), name, None) for name in ("_saved_result1", "_saved_result2")]
        if not all(isinstance(tensor, Tensor) and tensor.shape == (layer.num_features,) for tensor in saved):
            return None
        mean, inverse_std = (tensor.clone() for tensor in saved if tensor is not None)
        var, unbiased = to_float64(inverse_std).pow(-2) - layer.eps, False
    # Half-precision statistics are off by several per cent.
    return (mean, var, unbiased) if mean.dtype in (torch.float32, torch.float64) else None


def _in_backward() -> bool:
    """Whether the backward pass is running, which repeats the forwards of checkpointed parts."""
    return torch._C._current_graph_task_id() != -1
