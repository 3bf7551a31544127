"""What comes before a layer, read off the data flow by torch.fx; what cannot be traced stays unknown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bnkit.preservation import random_states_preserved
from bnkit.tracing import original, trace

__all__ = ["Before", "Dropout", "active_dropout", "what_comes_before"]

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
_TRANSPARENT = (nn.Identity,)


class Dropout(NamedTuple):
    """A dropout by its name in the model, or by the function's, and its probability."""

    name: str
    p: float


class Before(NamedTuple):
    """What comes before a BatchNorm layer.

    Attributes:
        modules: whose output is the layer's input itself, over all its calls in the traced part.
        alone: whether nothing but BatchNorm layers uses those outputs.
        dropouts: upstream, with no other BatchNorm layer in between.
    """

    modules: tuple[nn.Module, ...]
    alone: bool
    dropouts: tuple[Dropout, ...]


def what_comes_before(model: nn.Module) -> dict[nn.Module, Before]:
    """By BatchNorm layer, for those in a part of the model that can be traced.

    The model is traced as a whole, or where its forward depends on its data, each of its parts. Nothing is computed,
    and the model and the random state are left as they are.
    """
    names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    found: dict[nn.Module, Before] = {}
    with random_states_preserved(model):  # a forward may draw numbers while it is traced
        _trace(model, names, found)
    return found


def active_dropout(module: nn.Module) -> bool:
    """Whether the module, in training mode, changes the variance of what goes through it.

    AlphaDropout is made to keep it.
    """
    return (
        isinstance(module, _DropoutNd)
        and module.p > 0
        and not isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout)
    )


def _trace(part: nn.Module, names: dict[nn.Module, str], found: dict[nn.Module, Before]) -> None:
    if not any(isinstance(module, _BatchNorm) for module in part.modules()):
        return
    try:
        copy, graph = trace(part)
        module_of = {
            node: original(copy.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"
        }
    except Exception:  # whatever a forward does with a tensor that has no values
        for child in part.children():
            _trace(child, names, found)
        return
    for node, layer in module_of.items():
        if isinstance(layer, _BatchNorm):
            source = _directly_before(node, module_of)
            before = Before(
                () if source is None else (module_of[source],),
                source is not None and all(isinstance(user, _BatchNorm) for user in _users(source, module_of)),
                tuple(_dropouts(node, module_of, names)),
            )
            seen = found.get(layer)
            if seen is not None:
                before = Before(
                    seen.modules + before.modules, seen.alone and before.alone, seen.dropouts + before.dropouts
                )
            found[layer] = before


def _directly_before(node: fx.Node, module_of: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """The call of a module whose output is the input of this one; None where that is something else."""
    before = node.all_input_nodes[0] if node.all_input_nodes else None
    while before is not None and isinstance(module_of.get(before), _TRANSPARENT):
        before = before.all_input_nodes[0] if before.all_input_nodes else None
    return before if before in module_of else None


def _users(node: fx.Node, module_of: dict[fx.Node, nn.Module]) -> Iterator[nn.Module | None]:
    """The modules that use a node's output; None for an operation that is none."""
    for user in node.users:
        if isinstance(module_of.get(user), _TRANSPARENT):
            yield from _users(user, module_of)
        else:
            yield module_of.get(user)


def _dropouts(node: fx.Node, module_of: dict[fx.Node, nn.Module], names: dict[nn.Module, str]) -> Iterator[Dropout]:
    """Those upstream of a layer, as far as the next BatchNorm layers."""
    to_visit, visited = list(node.all_input_nodes), set()
    while to_visit:
        current = to_visit.pop()
        if current in visited:
            continue
        visited.add(current)
        module = module_of.get(current)
        if module is not None and active_dropout(module):
            yield Dropout(repr(names.get(module, type(module).__name__)), float(module.p))  # type: ignore[arg-type]
        elif current.op == "call_function" and current.target in _DROPOUTS:
            yield from _functional(current)
        if not isinstance(module, _BatchNorm):
            to_visit += current.all_input_nodes


def _functional(node: fx.Node) -> Iterator[Dropout]:
    """A call of ``F.dropout``, unless it is off or its probability is computed."""
    p, training = (
        node.kwargs.get(name, node.args[position] if len(node.args) > position else default)
        for name, position, default in (("p", 1, 0.5), ("training", 2, True))
    )
    if isinstance(p, int | float) and p > 0 and training:
        yield Dropout(str(getattr(node.target, "__name__", node.target)), float(p))
