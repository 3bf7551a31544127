"""What a spec is, and how it turns a torch BatchNorm into a variant and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnkit.norms.adapters import TORCH, adapted, kind_of

__all__ = ["Context", "Spec", "Swapped", "check_class", "original_class", "spec_of", "undo"]

RECORD = "_bnkit_swapped"
"""Name of the attribute that holds a swapped module's ``Swapped``. Not a part of the state_dict."""


@dataclass(frozen=True)
class Context:
    """What a spec may need to know beside the layer.

    Attributes:
        device_batch: samples in one device's training batch; None where nobody knows.
        world_size: number of ranks that train together.
        convolution: the convolution whose output the layer normalises; None where there is none.
    """

    device_batch: int | None = None
    world_size: int = 1
    convolution: nn.Module | None = None


@dataclass
class Swapped:
    """What [`bnkit.norms.undo`][] needs; a module that is not torch's own any more carries one.

    Attributes:
        original: the class that the module had.
        spec: what it was swapped by.
        kept: what the spec changed or noted beside the class.
    """

    original: type[nn.Module]
    spec: Any
    kept: dict[str, Any] = field(default_factory=dict)


class Spec:
    """How a BatchNorm layer should normalise. Subclasses are frozen dataclasses of plain, serialisable values.

    A subclass names its layer classes and overrides what differs:

    - ``check`` refuses, before anything has changed;
    - ``attach`` adds what the layer needs beside its class, and returns what ``detach`` needs to take it away again;
    - ``resolve`` picks another spec (None: plain BatchNorm) where the choice depends on the context.
    """

    layers: ClassVar[tuple[type[_BatchNorm], type[_BatchNorm], type[_BatchNorm]]]
    """The variant's classes over BatchNorm1d, BatchNorm2d and BatchNorm3d."""

    needs_running_statistics: ClassVar[bool] = False
    needs_convolution: ClassVar[bool] = False

    def resolve(self, context: Context) -> Spec | None:  # noqa: ARG002
        """The spec to apply in this context; None for plain BatchNorm."""
        return self

    def check(self, layer: _BatchNorm, context: Context) -> None:  # noqa: ARG002
        """Refuse a layer that cannot have this spec. Nothing has been changed yet.

        Raises:
            TypeError: for a layer whose class is not known, and for a convolution that cannot be swapped; see
                ``check_class``.
            ValueError: for a layer without the running statistics that the spec works by.
        """
        check_class(layer)
        if self.needs_running_statistics and layer.running_var is None:
            raise ValueError(f"{self} works by running statistics: give the layer track_running_stats=True.")

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """Add to the layer, before it has its new class, and return what ``detach`` needs."""
        return {}

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:
        """Take away what ``attach`` added, while the layer still has its new class."""

    def apply(self, layer: _BatchNorm, context: Context | None = None) -> None:
        """Make the layer this variant, in place: its class changes, its parameters, buffers and hooks do not.

        A layer that is a variant already is undone first, so that [`bnkit.norms.undo`][] always gives the first class
        back.

        Raises:
            TypeError, ValueError: as ``check`` and ``resolve``; the layer is then as it was.
        """
        context = context or Context()
        spec = self.resolve(context)
        if spec is None:
            undo(layer)
            return
        spec.check(layer, context)
        undo(layer)
        variant = adapted(spec.layers[TORCH.index(kind_of(type(layer)))], type(layer))
        setattr(layer, RECORD, Swapped(type(layer), spec, spec.attach(layer, context)))
        layer.__class__ = variant


def undo(module: nn.Module) -> bool:
    """Give a swapped module its original class and attributes back, in place.

    Returns:
        Whether there was anything to undo.

    Raises:
        TypeError: for a module that was parametrized since.
    """
    record: Swapped | None = module.__dict__.get(RECORD)
    if record is None:
        return False
    if is_parametrized(module):
        raise TypeError(
            f"{type(module).__name__} was parametrized after it was swapped, and its original class would lose the "
            "parametrizations: remove them first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if isinstance(module, _BatchNorm):
        record.spec.detach(module, record.kept)
    module.__class__ = record.original
    delattr(module, RECORD)
    return True


def check_class(layer: _BatchNorm) -> None:
    """Refuse a layer that cannot be swapped, whatever the spec.

    Raises:
        TypeError: for a layer whose class is neither torch's own nor registered, and for one that is parametrized,
            which has a class of its own by that.
    """
    if is_parametrized(layer) and RECORD not in layer.__dict__:
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        raise TypeError(
            f"the layer is parametrized ({names}), and its class is what computes that: swap it first, and parametrize "
            "it then, or take the parametrization away by torch.nn.utils.parametrize.remove_parametrizations."
        )
    kind_of(original_class(layer))


def spec_of(module: nn.Module) -> Spec | None:
    """What the module was swapped by; None for a module that is as its author made it."""
    record: Swapped | None = module.__dict__.get(RECORD)
    return record.spec if record is not None and isinstance(record.spec, Spec) else None


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that [`bnkit.norms.undo`][] would give back."""
    record: Swapped | None = module.__dict__.get(RECORD)
    return type(module) if record is None else record.original
