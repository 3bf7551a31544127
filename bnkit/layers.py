"""Finding a model's BatchNorm layers, and telling them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

__all__ = ["batch_norm_layers", "keeps_forward", "tracks_statistics", "unwrap"]


def unwrap(model: Any) -> nn.Module:
    """The user's own model inside the wrappers of DistributedDataParallel, DataParallel, torch.compile and Fabric.

    Raises:
        TypeError: what is given is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a torch.nn.Module, and it comes first; it is a {type(model).__name__}.")
    inner: nn.Module = model
    while True:
        if isinstance(inner, DistributedDataParallel | DataParallel):
            inner = inner.module
        elif "_forward_module" in inner._modules and "_original_module" in inner._modules:  # Lightning Fabric's
            inner = inner._modules["_original_module"]  # type: ignore[assignment]
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod  # type: ignore[assignment]
        else:
            return inner


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of the ``torch.nn.BatchNorm*`` family by qualified name, each once, in the order of registration.

    A layer that is used in several places has its first name. Names are those of the unwrapped model, also where parts
    of it are compiled.

    Raises:
        TypeError: for a scripted model, whose layers cannot be told apart or hooked.
        ValueError: for a model with a lazy layer that no forward has materialised yet.
    """
    model = unwrap(model)
    layers: dict[str, _BatchNorm] = {}
    for name, module in model.named_modules():
        name = name.replace("_orig_mod.", "").removesuffix("._orig_mod")
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
            raise TypeError(
                f"bnkit cannot see into the scripted BatchNorm layer {name!r}: "
                "hand over the model as it was before torch.jit.script or torch.jit.trace."
            )
        if isinstance(module, _BatchNorm):
            tensors = (*module._parameters.values(), *module._buffers.values())
            if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
                raise ValueError(
                    f"The lazy layer {name!r} has no channels yet: run one forward to materialise it first."
                )
            layers[name] = module
    return layers


def tracks_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer has running statistics and updates them in training mode."""
    return layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None


def keeps_forward(layer: _BatchNorm) -> bool:
    """Whether the layer's forward is torch's own, which updates the running statistics as documented there."""
    return type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
