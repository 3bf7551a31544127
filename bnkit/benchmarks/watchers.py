"""What else watches a network's layers at every step, for the monitor's benchmark."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnkit.benchmarks.peers import NEEDS_TORCHVISION
from bnkit.layers import batch_norm_layers

__all__ = ["NOT_COMPARED", "STAND_INS", "hooks", "watched_by_wandb"]

STAND_INS: dict[str, Callable[[Tensor], Any]] = {
    "stand-in: hooks, mean and std": lambda x: [x.mean().item(), x.std().item()],
    "stand-in: hooks, mean, std, histogram": lambda x: [
        x.mean().item(),
        x.std().item(),
        x.float().cpu().histc(40).tolist(),
    ],
}
"""Written here, because what does so cannot be installed beside bnkit: what activation statistics by forward hooks do
at the least. They read each layer's input and wait for the numbers."""

NOT_COMPARED = {
    "fastai ActivationStats": f"{NEEDS_TORCHVISION}; the stand-ins do as much as such hooks have to",
    "lightning-bolts ModuleDataMonitor": "not tried: it requires a lightning older than 2.0; the stand-in with a "
    "histogram does as much as it has to",
}


@contextmanager
def hooks(network: nn.Module, read: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let every BatchNorm layer's input be read."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        with torch.no_grad():
            read(args[0].detach())

    handles = [layer.register_forward_hook(hook) for layer in batch_norm_layers(network).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_by_wandb(networks: Mapping[Any, nn.Module]) -> Iterator[Callable[[int], None]]:
    """``wandb.watch`` at every step, in an offline run that is thrown away.

    Args:
        networks: by what is logged of them, "gradients", "parameters" or "all".

    Yields:
        What logs a step; to be called after each.

    Raises:
        RuntimeError: where another run is going on, which this would log into.
    """
    import wandb

    if wandb.run is not None:
        raise RuntimeError("a W&B run is going on in this process")
    with tempfile.TemporaryDirectory() as folder:
        silent = os.environ.get("WANDB_SILENT")
        os.environ["WANDB_SILENT"] = "true"
        settings = wandb.Settings(silent=True, x_disable_stats=True, console="off")
        run = wandb.init(mode="offline", dir=folder, project="benchmark", settings=settings)
        try:
            for index, (log, network) in enumerate(networks.items()):
                run.watch(network, log=log, log_freq=1, idx=index)
            yield lambda step: run.log({"step": step})
        finally:
            for network in networks.values():
                run.unwatch(network)
            run.finish()
            if silent is None:
                del os.environ["WANDB_SILENT"]
            else:
                os.environ["WANDB_SILENT"] = silent
