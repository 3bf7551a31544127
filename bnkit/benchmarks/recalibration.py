"""What recalibration costs beyond the forwards that any recalibration has to make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnkit
from bnkit.benchmarks import fashion, peers
from bnkit.benchmarks.memory import peaks
from bnkit.benchmarks.models import networks_of
from bnkit.benchmarks.result import Goal, Result, Row, clock_of, rows
from bnkit.benchmarks.timing import interleave
from bnkit.layers import batch_norm_layers
from bnkit.training import ResNet

__all__ = ["FLOOR", "measure"]

FLOOR = "bare no-grad forward"


def measure(
    *,
    width: int,
    depths: Sequence[int] | Sequence[Sequence[int]],
    pixels: int | Sequence[int],
    batch_size: int,
    batches: int,
    samples: Mapping[str, Any] | None,
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Recalibrate residual networks by bnkit and its peers, over the same batches, beside the bare forwards.

    Args:
        width: channels of the network's first stage.
        depths: residual blocks in each stage, of one network or of several.
        pixels: height and width of the images; one number, or one for each network.
        batch_size: images a batch.
        batches: of one recalibration.
        samples: arguments of ``bnkit.benchmarks.fashion.measure``; None: leave that out.
        rounds: measurements of each.
        device: to compute on.
        seed: of weights, images and order.
    """
    table: list[Row] = []
    found, missing = _candidates()
    for depth, size in networks_of(depths, pixels):
        torch.manual_seed(seed)
        network = ResNet(width=width, depths=depth).to(device).train()
        data = [torch.randn(batch_size, 1, size, size, device=device) for _ in range(batches)]
        exact = population(network, data)
        notes, calls = {}, {FLOOR: _bound(_forward, network, data)}
        for name, recalibrate in found.items():
            model = copy.deepcopy(network)
            recalibrate(model, data)
            notes[name] = f"variances up to {_off(model, exact):.0e} off"
            calls[name] = _bound(recalibrate, copy.deepcopy(network), data)
        timings = interleave(calls, baseline=FLOOR, rounds=rounds, seed=seed, device=device)
        goals = {"bnkit": Goal(clock_of(device), 1.02)}
        what = f"{len(exact)} BatchNorm layers"
        table += rows(what, timings, peaks(calls, device), goals=goals, notes=notes)
    texts = ["Off: worst channel's relative error of the running variance, beside that of all values in float64."]
    if samples is not None:
        more, said, not_there = fashion.measure(**samples, device=device, seed=seed)
        table, texts, missing = table + more, texts + said, missing | not_there
    return Result(
        "recalibration",
        device,
        f"A recalibration over {batches} batches of {batch_size} images in memory, over the bare forward of the same "
        "batches, without gradients and in training mode, which no recalibration by batch statistics can do without.",
        rounds,
        table,
        texts,
        missing,
    )


def population(network: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """The variance of every value that each layer gets, upstream layers normalising by their batch, in float64."""
    model = copy.deepcopy(network).train()
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in batch_norm_layers(model)}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, total = args[0].double(), sums[name]
            reduced = [d for d in range(x.dim()) if d != 1]
            total[0] += x.numel() // x.shape[1]
            total[1] = total[1] + x.sum(reduced)
            total[2] = total[2] + x.square().sum(reduced)

        return add

    for name, layer in batch_norm_layers(model).items():
        layer.register_forward_pre_hook(hook(name))
    _forward(model, data)
    return {name: squares / count - (total / count) ** 2 for name, (count, total, squares) in sums.items()}


def _off(model: nn.Module, exact: Mapping[str, Tensor]) -> float:
    """Worst relative error of the running variances; channels that hardly vary are left out."""
    worst = 0.0
    for name, layer in batch_norm_layers(model).items():
        var = exact[name]
        assert layer.running_var is not None
        error = ((layer.running_var.double() - var) / var).abs()
        worst = max(worst, float(error[var > var.mean() * 1e-6].max()))
    return worst


def _candidates() -> tuple[dict[str, Callable[[nn.Module, list[Tensor]], object]], dict[str, str]]:
    """By name what recalibrates a model on batches, and what cannot be compared, with the reason."""
    found: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
        "bnkit": lambda model, data: bnkit.recalibrate(model, data, max_samples=None),
        "torch update_bn": lambda model, data: update_bn(data, model),
    }
    missing = {"mmpretrain PreciseBNHook": "not tried: a hook of mmengine's own training loop"}
    update_bn_stats = peers.find("fvcore.nn.precise_bn", "update_bn_stats")
    if update_bn_stats is None:
        missing["fvcore update_bn_stats"] = peers.NOT_INSTALLED
    else:
        found["fvcore update_bn_stats"] = lambda model, data: update_bn_stats(model, data, num_iters=len(data))
    return found, missing


def _forward(model: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in data:
            model(batch)


def _bound(
    function: Callable[[nn.Module, list[Tensor]], object], model: nn.Module, data: list[Tensor]
) -> Callable[[], object]:
    return lambda: function(model, data)
