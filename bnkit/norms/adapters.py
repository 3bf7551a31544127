"""Which layer classes can be swapped, and how those of other libraries can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["TORCH", "After", "adapted", "kind_of", "register_adapter"]

After = Callable[[Any, Tensor], Tensor]
"""What a layer does with its normalised activation: a function of the layer and the activation."""

TORCH: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Adapter(NamedTuple):
    """How a class differs from torch's own."""

    kind: type[_BatchNorm]
    after: After | None = None


_KINDS: dict[type[nn.Module], Adapter] = {kind: Adapter(kind) for kind in TORCH}
_ADAPTED: dict[tuple[type[_BatchNorm], type[nn.Module], After], type[_BatchNorm]] = {}


def register_adapter(
    layer_class: type[_BatchNorm], kind: type[_BatchNorm] | None = None, *, after: After | None = None
) -> None:
    """Say what another library's subclass of BatchNorm does, so that it can be swapped.

    Its forward must be batch normalization and then, where ``after`` is given, a function of the result. While swapped
    the layer is normalised by the variant and goes through ``after``; its own forward does not run. Reverting gives
    the class itself back. Subclasses need an adapter of their own.

    Args:
        layer_class: the class, a subclass of ``torch.nn.BatchNorm1d``, ``2d`` or ``3d``, or ``torch.nn.SyncBatchNorm``.
        kind: which of torch's three it normalises as; None: the one that it is a subclass of.
        after: what it does with the normalised activation, a function of the layer and the activation. To pickle a
            swapped model, it has to be registered where the model is loaded too.

    Raises:
        TypeError: where ``layer_class`` is no subclass of torch's BatchNorm.
        ValueError: where ``kind`` is none of the three, or is not given and cannot be told from the class.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bnkit
        >>> class BatchNormAct2d(nn.BatchNorm2d):  # as timm has one
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> bnkit.register_adapter(BatchNormAct2d, after=lambda layer, y: y.relu())
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))
        >>> _ = bnkit.swap(model, bnkit.norms.Ghost(4))
        >>> bool((model(torch.randn(8, 3, 5, 5)) >= 0).all())
        True
        >>> bnkit.revert(model), type(model[1]).__name__
        (['1'], 'BatchNormAct2d')
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, _BatchNorm)):
        raise TypeError(f"An adapter is for a subclass of torch's BatchNorm, and {layer_class!r} is none.")
    found = [own for own in TORCH if issubclass(layer_class, own)]
    if kind is None and not found:
        raise ValueError(
            f"{layer_class.__name__} is no subclass of nn.BatchNorm1d, 2d or 3d: say which of them it normalises as."
        )
    kind = found[0] if kind is None else kind
    if kind not in TORCH:
        raise ValueError(f"A kind is nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, not {kind.__name__}.")
    _KINDS[layer_class] = Adapter(kind, after)


def kind_of(layer_class: type[nn.Module]) -> type[_BatchNorm]:
    """Which of torch's three classes a layer class normalises as.

    Raises:
        TypeError: for a class that is neither torch's own nor registered; the message says what to do.
    """
    if layer_class in _KINDS:
        return _KINDS[layer_class].kind
    if layer_class is nn.SyncBatchNorm:
        raise TypeError(
            "torch.nn.SyncBatchNorm does not say whether it is 1d, 2d or 3d, so bnkit cannot swap it: leave "
            "convert_sync_batchnorm out and swap nn.BatchNorm layers by bnkit.norms.Sync(), or say which it is by "
            "bnkit.register_adapter(nn.SyncBatchNorm, nn.BatchNorm2d)."
        )
    raise TypeError(
        f"bnkit does not know what {layer_class.__module__}.{layer_class.__qualname__} does beside batch "
        "normalization, so it cannot swap it: say so by bnkit.register_adapter, or leave the layer out."
    )


def adapted(variant: type[_BatchNorm], layer_class: type[nn.Module]) -> type[_BatchNorm]:
    """The class for a swapped layer: the variant, and what the layer's own class does after it."""
    after = _KINDS[layer_class].after
    if after is None:
        return variant
    key = (variant, layer_class, after)
    if key not in _ADAPTED:
        _ADAPTED[key] = _with_after(*key)
    return _ADAPTED[key]


def _with_after(variant: type[_BatchNorm], layer_class: type[nn.Module], after: After) -> type[_BatchNorm]:
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002
        return after(self, variant.forward(self, input))

    def reduce(self: Any, protocol: Any) -> Any:
        # The class has no name to be found by: it is made again from the two that have.
        return (_new, (variant, layer_class), *variant.__reduce_ex__(self, protocol)[2:])

    body = {"__module__": __name__, "__doc__": variant.__doc__, "forward": forward, "__reduce_ex__": reduce}
    return type(f"{variant.__name__}For{layer_class.__name__}", (variant,), body)


def _new(variant: type[_BatchNorm], layer_class: type[nn.Module]) -> _BatchNorm:
    """An empty layer for pickle and deepcopy to fill."""
    kind_of(layer_class)
    cls = adapted(variant, layer_class)
    layer: _BatchNorm = cls.__new__(cls)
    return layer
