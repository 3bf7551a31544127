"""Which convolution a BatchNorm layer normalises, read off the data flow and never guessed from names or order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bnkit.layers import unwrap
from bnkit.tracing import original, trace

__all__ = ["find_convolutions"]


def find_convolutions(
    model: nn.Module, layers: Iterable[str], given: Mapping[str, str] | None = None
) -> dict[str, nn.Module]:
    """The convolution (or linear layer) whose output each layer normalises.

    The smallest part of the model that holds the layer is traced with ``torch.fx``, then the next larger one, until the
    layer's input is the output of a module. Nothing is computed, and the model is left as it is: a copy without its
    hooks is traced, which shares the parameters.

    Args:
        model: the model.
        layers: names of BatchNorm layers.
        given: names of convolutions by layer name, for those that cannot be found.

    Returns:
        The convolutions by layer name.

    Raises:
        ValueError: for a layer whose convolution cannot be known; the message says why, and what to do.
    """
    model, given = unwrap(model), given or {}
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules(remove_duplicate=False)}
    traced: dict[str, dict[nn.Module, set[nn.Module | str]] | str] = {}
    found: dict[str, nn.Module] = {}
    for name in layers:
        if name in given:
            if given[name] not in modules:
                raise ValueError(f"convolutions: the model has no module {given[name]!r}, given for {name!r}.")
            found[name] = modules[given[name]]
            continue
        why = "its input could not be traced"
        for part in _parts(name):
            if part not in traced:
                traced[part] = _sources(modules[part])
            sources = traced[part]
            if isinstance(sources, str):
                why = sources
                continue
            source = sources.get(modules[name], set())
            if source and "an argument" not in source:
                break
            if source and not part:
                why = "its input is the model's own"
        else:
            source = set()
        if len(source) == 1 and isinstance(only := next(iter(source)), nn.Module):
            found[name] = only
            continue
        why = " and ".join(sorted(str(s) for s in source if isinstance(s, str))) or why
        why = f"its input is {why}" if source else why
        raise ValueError(
            f"Which convolution comes right before {name!r} cannot be known ({why}): name it by "
            f'convolutions={{"{name}": "NAME"}}, or leave the layer out by the rule {{"{name}": None}}.'
        )
    return found


def _parts(name: str) -> Iterator[str]:
    """Names of the modules around a layer, from the smallest to the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _sources(part: nn.Module) -> dict[nn.Module, set[nn.Module | str]] | str:
    """For each BatchNorm layer in a traced part, whose output it normalises, or in words what else; or why not."""
    try:
        copy, graph = trace(part)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"torch.fx cannot trace {type(part).__name__}: {reason[0] if reason else type(error).__name__}"
    module_of = {
        node: original(copy.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"
    }
    consumers: dict[nn.Module, set[Any]] = {}
    for node, module in module_of.items():
        consumers.setdefault(module, set()).update(module_of.get(user, user) for user in _users(node, module_of))
    sources: dict[nn.Module, set[nn.Module | str]] = {}
    for node, layer in module_of.items():
        if isinstance(layer, _BatchNorm):
            source = _source(node, module_of)
            if isinstance(source, nn.Module) and consumers[source] != {layer}:
                source = f"the output of a {type(source).__name__} that other operations use too"
            sources.setdefault(layer, set()).add(source)
    return sources


def _source(node: fx.Node, module_of: dict[fx.Node, nn.Module]) -> nn.Module | str:
    before = node.all_input_nodes[0] if node.all_input_nodes else None
    while before is not None and isinstance(module_of.get(before), nn.Identity):
        before = before.all_input_nodes[0]
    if before is None or before.op == "placeholder":
        return "an argument"
    module = module_of.get(before)
    if isinstance(module, _ConvNd | nn.Linear):
        return module
    what = type(module).__name__ if module is not None else getattr(before.target, "__name__", str(before.target))
    return f"the output of {what}"


def _users(node: fx.Node, module_of: dict[fx.Node, nn.Module]) -> Iterator[fx.Node]:
    for user in node.users:
        if isinstance(module_of.get(user), nn.Identity):
            yield from _users(user, module_of)
        else:
            yield user
