"""What a checkpoint keeps of swapped layers beside the state_dict, and what can be done with it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.conversion import Conversion
from bnkit.norms import NormBatch, Sync, Variant
from bnkit.rules import parse_rules
from bnkit.swapping import swap

__all__ = ["describe_difference", "layer_states", "load_layer_states", "swap_as_saved"]

_REMEMBERED = ("step", "averages")
"""What layers remember outside the state_dict: see [`bnkit.norms`][]."""


def layer_states(layers: Mapping[str, _BatchNorm]) -> dict[str, dict[str, Any]]:
    """What each layer remembers outside the state_dict, as numbers and copies of tensors."""
    states: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        for what in _REMEMBERED:
            if isinstance(layer, Variant) and hasattr(layer, what):
                value = getattr(layer, what)
                copied = {k: v.detach().cpu().clone() for k, v in value.items()} if what == "averages" else value
                states.setdefault(name, {})[what] = copied
    return states


def load_layer_states(layers: Mapping[str, _BatchNorm], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the layers that still remember such things what they remembered."""
    for name, state in states.items():
        layer = layers.get(name)
        if not isinstance(layer, Variant):
            continue
        if "step" in state and hasattr(layer, "step"):
            layer.step = state["step"]
        if "averages" in state and hasattr(layer, "averages"):
            saved: dict[str, Tensor] = state["averages"]
            own: Any = layer.averages
            if all(saved[key].shape == tensor.shape for key, tensor in own.items()):  # else another window
                with torch.no_grad():
                    for key, tensor in own.items():
                        tensor.copy_(saved[key])


def describe_difference(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In words, which layers were what and are what; empty where nothing differs."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*saved, *now]):
        pair = (saved.get(name, "not swapped"), now.get(name, "not swapped"))
        if pair[0] != pair[1]:
            groups.setdefault(pair, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {was} when saved, {now_is} now"
        for (was, now_is), names in groups.items()
    )


def swap_as_saved(model: nn.Module, checkpoint: Mapping[str, Any]) -> Conversion | None:
    """Swap a module outside a trainer as it was swapped when a Lightning checkpoint of it was saved.

    To be called before the weights are loaded. ``Sync`` and ``NormBatch``, which have BatchNorm's inference, are left
    out.

    Returns:
        The conversion; None where the checkpoint knows of no swap.
    """
    states = (checkpoint.get("callbacks") or {}).values()
    # By what it holds, for a subclass has another key.
    state = next((state for state in states if isinstance(state, Mapping) and "remembered" in state), None)
    rules = parse_rules({glob.escape(name): spec for name, spec in state["layers"].items()}) if state else None
    rules = {name: spec for name, spec in (rules or {}).items() if not isinstance(spec, NormBatch | Sync)}
    if not rules or state is None:
        return None
    return swap(model, rules, convolutions={k: v for k, v in state["convolutions"].items() if glob.escape(k) in rules})
