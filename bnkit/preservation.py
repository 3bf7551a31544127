"""Context managers that undo what happened to a model and to the random states, however the block ends."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["preserved", "random_states_preserved"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give back every buffer, mode and momentum of the model as it was, also after an exception or Ctrl-C.

    Buffers are restored in place, bit for bit, and only those that were touched; one that was replaced by another
    tensor (as in ``self.counter = self.counter + 1``) is put back as the object that it was.
    """
    modules = list(model.modules())
    buffers = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [module.training for module in modules]
    momenta = [(module, module.momentum) for module in modules if isinstance(module, _BatchNorm)]
    try:
        yield
    finally:
        # Modes are attributes here: train() and eval() may be overridden, and do more than set them.
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        touched: list[Tensor] = []
        copies: list[Tensor] = []
        for module, name, buffer, copy, version in buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if version is None or _version(buffer) != version:
                touched.append(buffer)
                copies.append(copy)
        if touched:
            with torch.no_grad(), torch.inference_mode(touched[0].is_inference()):
                torch._foreach_copy_(touched, copies)


@contextmanager
def random_states_preserved(model: nn.Module, batches: object = None) -> Iterator[None]:
    """Give back the random states: Python's, NumPy's if it is loaded, torch's on the model's devices, the loader's.

    Args:
        model: its devices' generators are preserved.
        batches: a loader; its own generator and its samplers' are preserved too.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    numpy: Any = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy else None
    cuda_states = [(device, torch.cuda.get_rng_state(device)) for device in devices if device.type == "cuda"]
    mps_state = torch.mps.get_rng_state() if any(device.type == "mps" for device in devices) else None
    generators = [(generator, generator.get_state()) for generator in _generators_of(batches)]
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for device, state in cuda_states:
            torch.cuda.set_rng_state(state, device)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        for generator, state in generators:
            generator.set_state(state)


def _generators_of(batches: object) -> list[torch.Generator]:
    """The generators of a loader, its sampler and its batch sampler."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())


def _version(tensor: Tensor) -> int | None:
    """The count of in-place changes; None where the tensor does not keep it."""
    return None if tensor.is_inference() else tensor._version
