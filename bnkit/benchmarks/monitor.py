"""What watching every layer at every training step costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnkit.benchmarks.timing import Timings, interleave
from bnkit.dashboard.keys import short_names
from bnkit.dashboard.scalars import snapshot_scalars
from bnkit.layers import batch_norm_layers
from bnkit.monitoring import Monitor
from bnkit.training import ResNet

__all__ = ["BASELINE", "compare_monitors"]

BASELINE = "no monitor"


def compare_monitors(
    *,
    width: int = 32,
    depths: tuple[int, ...] = (2, 2, 2, 2),
    batch_size: int = 16,
    pixels: int = 16,
    steps: int = 50,
    rounds: int = 20,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Timings, dict[str, float]]:
    """Time training steps (forward, backward, SGD) without a monitor, with bnkit's, and with hooks on every layer.

    The two kinds of hooks, mean and standard deviation, and those with a histogram, are what activation statistics by
    forward hooks do at the least: they read each layer's input and wait for the numbers.

    Args:
        width: of :class:`bnkit.training.ResNet`.
        depths: of the same; ``1 + 2 * sum(depths) + len(depths) - 1`` BatchNorm layers.
        batch_size: images a batch.
        pixels: height and width of an image.
        steps: in one measurement; bnkit logs once in it.
        rounds: measurements of each.
        device: to train on.
        seed: of weights, images and order.

    Returns:
        The timings, and beside them ``"layers"`` and ``"own share"``: the monitor's own CPU time over that of the steps
        without it.
    """
    torch.manual_seed(seed)
    network = ResNet(width=width, depths=depths).to(device)
    images = torch.randn(batch_size, 1, pixels, pixels, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    with ExitStack() as hooks:
        plain, monitored, summed, counted = (_Training(copy.deepcopy(network), images, labels) for _ in range(4))
        monitor = Monitor(monitored.network, every_n_steps=steps)
        names = short_names(monitor.layers)

        def watch() -> None:
            for step in range(steps):
                monitor.before()
                monitored.step()
                snapshot = monitor.after(step, batch_size)
                if snapshot is not None:
                    snapshot_scalars(snapshot, monitor.layers, names, len(monitor.alarms))

        summed.hook(hooks, lambda x: [x.mean().item(), x.std().item()])
        counted.hook(hooks, lambda x: [x.mean().item(), x.std().item(), x.float().cpu().histc(40).tolist()])
        timings = interleave(
            {
                BASELINE: plain.times(steps),
                "bnkit": watch,
                "hooks: mean and std": summed.times(steps),
                "hooks: mean, std and histogram": counted.times(steps),
            },
            baseline=BASELINE,
            rounds=rounds,
            seed=seed,
        )
    own = monitor.seconds / (rounds + 1) / (sum(timings.cpu[BASELINE]) / rounds)
    return timings, {"layers": float(len(monitor.layers)), "own share": own}


class _Training:
    """One network in training on one batch."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network = network.train()
        self._images, self._labels = images, labels
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> None:
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.network(self._images), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def times(self, steps: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                self.step()

        return run

    def hook(self, hooks: ExitStack, read: Callable[[Tensor], Any]) -> None:
        """Let every BatchNorm layer's input be read, as fastai's ActivationStats and its kind do."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            with torch.no_grad():
                read(args[0].detach())

        for layer in batch_norm_layers(self.network).values():
            hooks.callback(layer.register_forward_hook(hook).remove)
