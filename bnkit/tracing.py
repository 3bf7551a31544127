"""The data flow of a model, by torch.fx, from a copy that nothing of the tracing comes back from."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bnkit.layers import unwrap
from bnkit.preservation import random_states_preserved

__all__ = ["original", "trace"]

_ORIGINAL = "_bnkit_original"


def trace(part: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """Trace a copy of the module, with BatchNorm, convolutions and linear layers as leaves.

    Nothing is computed, and the module is left as it is, and so are the random states.

    Args:
        part: the module, or a part of a model.

    Returns:
        The copy, which shares the parameters, and its graph; ``original`` leads from the copy's modules to the own.

    Raises:
        Exception: of any kind, where the forward cannot be traced.
    """
    with random_states_preserved(part), torch.no_grad():
        copy = _copy(part, {})
        return copy, _Tracer().trace(copy)


def original(copy: nn.Module) -> nn.Module:
    """The module that a module of a traced copy is the copy of."""
    return cast("nn.Module", copy.__dict__[_ORIGINAL])


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | _ConvNd | nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def _copy(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy with the same parameters, its own buffers and no hooks, each module of which knows its original."""
    module = unwrap(module)
    if module not in made:
        # By object's own: a fx.GraphModule's __new__ makes a class without the forward.
        copy = made[module] = object.__new__(module.__class__)
        copy.__dict__.update(module.__dict__)
        for name, value in module.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                copy.__dict__[name] = OrderedDict()
            elif type(value) in (list, dict, set):  # a forward may collect in it what is no tensor here
                copy.__dict__[name] = value.copy()
        copy.__dict__["_buffers"] = {n: None if b is None else b.detach().clone() for n, b in module._buffers.items()}
        copy.__dict__["_modules"] = {
            name: None if child is None else _copy(child, made) for name, child in module._modules.items()
        }
        copy.__dict__[_ORIGINAL] = module
    return made[module]
