"""Context managers that undo what happened to a model and to the random states, however the block ends."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["preserved", "random_states_preserved", "undoing"]


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Run ``undo`` when the block ends, and to its end: a Ctrl-C meanwhile is raised when all is undone.

    Args:
        undo: may be begun several times.
    """
    try:
        yield
    finally:
        try:
            undo()
        except KeyboardInterrupt:
            _again(undo)
            raise


def _again(undo: Callable[[], object]) -> None:
    try:
        undo()
    except KeyboardInterrupt:
        _again(undo)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give back every buffer, mode and momentum of the model as it was, also after an exception or Ctrl-C.

    Buffers come back bit for bit and as the objects that they were, whether they were written in place, through
    ``.data``, replaced by another tensor (as in ``self.counter = self.counter + 1``) or registered meanwhile.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    momenta = [(module, module.momentum) for module in modules if isinstance(module, _BatchNorm)]
    names = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in modules]
    buffers = {id(buffer): buffer for _, named, _ in names for buffer in named.values() if buffer is not None}
    # The storage that each had, to write to and to point to again, and its content.
    kept = [(buffer, buffer.data, buffer.detach().clone()) for buffer in buffers.values()]

    def undo() -> None:
        # Modes are attributes here: train() and eval() may be overridden, and do more than set them.
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, named, non_persistent in names:
            if module._buffers.keys() != named.keys() or any(module._buffers[n] is not b for n, b in named.items()):
                module._buffers.clear()
                module._buffers.update(named)
            if module._non_persistent_buffers_set != non_persistent:
                module._non_persistent_buffers_set.clear()
                module._non_persistent_buffers_set.update(non_persistent)
        for buffer, storage, _ in kept:
            if buffer.data_ptr() != storage.data_ptr() or buffer.shape != storage.shape:
                buffer.data = storage
        if kept:
            # Through the storages, so that autograd does not take the buffers for changed ones: they are as they were.
            with torch.no_grad(), torch.inference_mode(any(storage.is_inference() for _, storage, _ in kept)):
                torch._foreach_copy_([storage for _, storage, _ in kept], [content for _, _, content in kept])

    with undoing(undo):
        yield


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
    # Lightning Fabric's loaders shuffle by how often they were iterated.
    iterations = getattr(batches, "_num_iter_calls", None)

    def undo() -> None:
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
        if isinstance(iterations, int):
            batches._num_iter_calls = iterations  # type: ignore[attr-defined]

    with undoing(undo):
        yield


def _generators_of(batches: object) -> list[torch.Generator]:
    """The generators of a loader, its sampler and its batch sampler."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())
