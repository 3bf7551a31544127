"""What watching every layer at every training step costs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnkit.benchmarks.memory import peaks
from bnkit.benchmarks.models import networks_of
from bnkit.benchmarks.result import Goal, Result, Row, clock_of, rows
from bnkit.benchmarks.timing import Ratio, interleave
from bnkit.benchmarks.watchers import NOT_COMPARED, STAND_INS, hooks, watched_by_wandb
from bnkit.dashboard.keys import short_names
from bnkit.dashboard.scalars import snapshot_scalars
from bnkit.monitoring import Monitor
from bnkit.training import ResNet

__all__ = ["BASELINE", "Training", "measure", "watch"]

BASELINE = "no monitor"


def measure(
    *,
    width: int,
    depths: Sequence[int] | Sequence[Sequence[int]],
    pixels: int | Sequence[int],
    batch_size: int,
    steps: int,
    wandb: Sequence[str],
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Time training steps (forward, backward, SGD) without a monitor, with bnkit's, and with others.

    Args:
        width: of ``bnkit.training.ResNet``.
        depths: of the same, of one network or of several; ``1 + 2 * sum(depths) + len(depths) - 1`` BatchNorm layers.
        pixels: height and width of an image; one number, or one for each network.
        batch_size: images a batch.
        steps: in one measurement; bnkit takes a snapshot and turns it into scalars once in it.
        wandb: what ``wandb.watch`` is to log: "gradients", "parameters", "all".
        rounds: measurements of each.
        device: to train on.
        seed: of weights, images and order.
    """
    table: list[Row] = []
    missing = dict(NOT_COMPARED)
    for depth, size in networks_of(depths, pixels):
        torch.manual_seed(seed)
        network = ResNet(width=width, depths=depth).to(device)
        images = torch.randn(batch_size, 1, size, size, device=device)
        labels = torch.randint(10, (batch_size,), device=device)
        watches = {f"wandb.watch(log={log!r}, log_freq=1)": log for log in wandb}
        trainings = {
            name: Training(copy.deepcopy(network), images, labels) for name in (BASELINE, "bnkit", *watches, *STAND_INS)
        }
        calls = {name: training.times(steps) for name, training in trainings.items()}
        monitor = Monitor(trainings["bnkit"].network, every_n_steps=steps)
        calls["bnkit"] = watch(trainings["bnkit"], monitor, steps, batch_size)
        with ExitStack() as stack:
            for name, read in STAND_INS.items():
                stack.enter_context(hooks(trainings[name].network, read))
            try:
                networks = {log: trainings[name].network for name, log in watches.items()}
                told = stack.enter_context(watched_by_wandb(networks))
                calls |= {name: trainings[name].times(steps, told) for name in watches}
            except Exception as error:  # W&B's own reasons, such as another run in this process
                missing |= dict.fromkeys(watches, f"{type(error).__name__}: {error}")
                calls = {name: call for name, call in calls.items() if name not in watches}
            timings = interleave(calls, baseline=BASELINE, rounds=rounds, seed=seed, device=device)
            own = monitor.seconds / (rounds + 1) / statistics.fmean(timings.cpu[BASELINE])
            memory = peaks(calls, device)
        what = f"{len(monitor.layers)} BatchNorm layers"
        # On CUDA two runs of the same training differ by themselves.
        same = {name: _same(trainings[name], trainings[BASELINE]) for name in calls if device == "cpu"}
        table += rows(what, timings, memory, goals={"bnkit": Goal(clock_of(device), 1.01)}, notes=same)
        share = {"value": Ratio.of([own])}
        table.append(Row(what, "bnkit: CPU time counted inside", BASELINE, share, Goal("value", 0.01)))
    return Result(
        "monitor",
        device,
        f"{steps} training steps watched at every layer and step, one snapshot among them, over the same steps of the "
        "same network without a monitor.",
        rounds,
        table,
        [
            "wandb.watch reads gradients (and parameters, with log='all') at every step, and no activations; the time "
            "of W&B's own process, which writes them, is not in it."
        ],
        missing,
    )


class Training:
    """One network in training on one batch."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network = network.train()
        self._images, self._labels = images, labels
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> None:
        """Forward, backward, and a step of SGD."""
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.network(self._images), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def times(self, steps: int, then: Callable[[int], object] = lambda _: None) -> Callable[[], None]:
        """So many steps, each followed by ``then``."""

        def run() -> None:
            for step in range(steps):
                self.step()
                then(step)

        return run


def watch(training: Training, monitor: Monitor, steps: int, batch_size: int) -> Callable[[], None]:
    """So many steps under bnkit's monitor, its snapshots turned into scalars as the callback does."""
    names = short_names(monitor.layers)

    def run() -> None:
        for step in range(steps):
            monitor.before()
            training.step()
            snapshot = monitor.after(step, batch_size)
            if snapshot is not None:
                snapshot_scalars(snapshot, monitor.layers, names, len(monitor.alarms))

    return run


def _same(training: Training, plain: Training) -> str:
    """Both have taken the same steps from the same start."""
    pairs = zip(training.network.parameters(), plain.network.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    return "weights bit-identical" if same else "changes the weights"
