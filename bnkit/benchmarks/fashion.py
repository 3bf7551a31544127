"""How many samples of Fashion-MNIST recalibration takes to a given standard error, and what they are worth."""

from __future__ import annotations

import copy
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

import bnkit
from bnkit.benchmarks.result import Goal, Row
from bnkit.benchmarks.timing import Ratio
from bnkit.layers import batch_norm_layers
from bnkit.training import FashionMNIST, ResNet

__all__ = ["measure"]


def measure(
    *,
    directory: str,
    batch_size: int,
    width: int,
    depths: list[int],
    training_steps: int,
    train_size: int | None,
    tolerance: float,
    orders: int,
    device: str,
    seed: int,
) -> tuple[list[Row], list[str], dict[str, str]]:
    """Train a small network for a while, recalibrate it by a full pass, and by ``tolerance`` in several orders.

    Args:
        directory: of the four IDX files.
        batch_size: images a batch.
        width: of ``bnkit.training.ResNet``.
        depths: of the same.
        training_steps: before, with SGD.
        train_size: images of a full pass; None: all 55,000 of the training split.
        tolerance: of ``bnkit.recalibrate``.
        orders: of the data, drawn anew; the spread is over them.
        device: to compute on.
        seed: of weights and orders.

    Returns:
        Rows, notes, and what was not measured, with the reason.
    """
    data = FashionMNIST(directory=directory, batch_size=batch_size, train_size=train_size)
    try:
        data.prepare_data()
    except FileNotFoundError as error:
        return [], [], {"samples to a standard error on Fashion-MNIST": str(error)}
    loader = data.train_dataloader()
    torch.manual_seed(seed)
    network = ResNet(width=width, depths=tuple(depths)).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    trained = 0
    while trained < training_steps:
        for images, labels in islice(loader, training_steps - trained):
            optimizer.zero_grad()
            F.cross_entropy(network(images.to(device)), labels.to(device)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            trained += 1
    full = bnkit.recalibrate(network, loader, max_samples=None)
    shares, worst_mean, worst_std, usual_mean, usual_std, slowest = [], [], [], [], [], []
    for order in range(orders):
        torch.manual_seed(seed + 1 + order)
        # A report compares with what the layers held before: here with the full pass.
        model = copy.deepcopy(network)
        report = bnkit.recalibrate(model, loader, max_samples=None, tolerance=tolerance)
        shares.append(report.samples / full.samples)
        means = torch.cat([layer.mean_shift for layer in report.layers.values()]).abs()
        deviations = (torch.cat([layer.var_ratio for layer in report.layers.values()]).sqrt() - 1).abs()
        worst_mean.append(float(means.max()))
        worst_std.append(float(deviations.max()))
        usual_mean.append(float(means.square().mean().sqrt()))
        usual_std.append(float(deviations.square().mean().sqrt()))
        slowest.append(max((_relative_error(model, report, name), name) for name in report.layers)[1])
    what = f"Fashion-MNIST, standard error {tolerance:.0%}"
    over = f"a full pass of {full.samples:,}"
    within = Goal("value", 0.01)
    table = [
        Row(what, "samples needed", over, {"value": Ratio.of(shares)}, Goal("value", 0.25)),
        Row(what, "mean off, in std: worst channel", over, {"value": Ratio.of(worst_mean)}, within),
        Row(what, "mean off, in std: root mean square", over, {"value": Ratio.of(usual_mean)}, within),
        Row(what, "std off, relative: worst channel", over, {"value": Ratio.of(worst_std)}, within),
        Row(what, "std off, relative: root mean square", over, {"value": Ratio.of(usual_std)}, within),
    ]
    note = (
        f"Fashion-MNIST: a ResNet of width {width} and depths {list(depths)} after {training_steps} training steps; "
        f"{orders} orders of the data. The last layer to reach the standard error: {', '.join(sorted(set(slowest)))}."
    )
    return table, [note], {}


def _relative_error(model: nn.Module, report: bnkit.RecalibrationReport, name: str) -> float:
    """The standard error of a layer's worst channel, in that channel's standard deviation."""
    var = batch_norm_layers(model)[name].running_var
    assert var is not None
    error = report.layers[name].standard_error / var.double().cpu().sqrt()
    return float(error.nan_to_num(0.0).max())  # a channel that never varies has none
