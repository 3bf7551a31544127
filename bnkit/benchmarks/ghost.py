"""What ghost batches cost over plain BatchNorm, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnkit
from bnkit.benchmarks import peers
from bnkit.benchmarks.memory import peaks
from bnkit.benchmarks.models import backward_of
from bnkit.benchmarks.result import Goal, Result, Row, clock_of, rows
from bnkit.benchmarks.timing import interleave
from bnkit.norms import Ghost

__all__ = ["PLAIN", "expected", "measure"]

PLAIN = "torch BatchNorm"

_GROUPINGS = ("strided", "contiguous")

_Maker = Callable[[nn.Module, int], Callable[[Tensor], Tensor]]


def measure(
    *,
    shapes: Mapping[str, Sequence[int]],
    sizes: Sequence[int],
    channels_last: bool,
    compiler: str | None,
    seconds: float,
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Time a layer's forward and backward as plain BatchNorm, as bnkit's Ghost in both groupings, and as the peers'.

    Args:
        shapes: of the input by name, (N, C) or (N, C, H, W).
        sizes: samples a ghost.
        channels_last: the 4D shapes in that memory format too.
        compiler: backend of torch.compile; None: eager only.
        seconds: that one measurement of the plain layer takes about, by as many calls in it.
        rounds: measurements of each.
        device: to compute on.
        seed: of inputs and order.
    """
    torch.manual_seed(seed)
    table: list[Row] = []
    found, missing = _peers()
    for name, shape in shapes.items():
        formats = [torch.contiguous_format]
        if len(shape) == 4 and channels_last:
            formats.append(torch.channels_last)
        for memory_format in formats:
            x = torch.randn(*shape, device=device).contiguous(memory_format=memory_format) + 1
            layout = "channels_last" if memory_format is torch.channels_last else name
            for size in sizes:
                for backend in (None, compiler) if compiler else (None,):
                    what = f"{layout} {tuple(shape)}, size {size}" + (", compiled" if backend else "")
                    limit = _limit(len(shape), memory_format is torch.channels_last, backend is not None)
                    goal = Goal(clock_of(device), limit)
                    makers = {f"bnkit {grouping}": _bnkit(grouping) for grouping in _GROUPINGS}
                    makers |= {} if backend else found
                    try:
                        table += _compare(what, x, size, makers, goal, backend, seconds, rounds, device, seed)
                    except Exception as error:
                        if backend is None:
                            raise
                        missing[what] = f"torch.compile(backend={backend!r}) failed, {type(error).__name__}: {error}"
    return Result(
        "ghost",
        device,
        "Forward and backward of one layer of ghost batch normalization over torch's BatchNorm on the same input; "
        "compiled over compiled.",
        rounds,
        table,
        ["A ghost layer's output is compared with torch's batch norm of each ghost by itself before it is timed."],
        missing,
    )


def expected(x: Tensor, size: int, grouping: str) -> Tensor:
    """Torch's batch norm of each ghost by itself, in float64."""
    x, count = x.double(), max(1, len(x) // size)
    if grouping == "contiguous":
        return torch.cat([F.batch_norm(ghost, None, None, training=True) for ghost in torch.tensor_split(x, count)])
    output = torch.empty_like(x)
    for ghost in range(count):
        output[ghost::count] = F.batch_norm(x[ghost::count], None, None, training=True)
    return output


def _compare(
    what: str,
    x: Tensor,
    size: int,
    makers: Mapping[str, _Maker],
    goal: Goal,
    backend: str | None,
    seconds: float,
    rounds: int,
    device: str,
    seed: int,
) -> list[Row]:
    plain = _layer(x)
    layers: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: plain}
    layers |= {name: make(_layer(x), size) for name, make in makers.items()}
    notes = {name: _wrong(layer, x, size) for name, layer in layers.items() if name != PLAIN}
    if backend is not None:
        torch.compiler.reset()
        layers = {name: torch.compile(layer, backend=backend, dynamic=False) for name, layer in layers.items()}
    once = interleave({PLAIN: backward_of(layers[PLAIN], x)}, baseline=PLAIN, rounds=3, device=device)
    times = max(1, round(seconds / min(once.wall[PLAIN])))
    calls = {name: backward_of(layer, x, times) for name, layer in layers.items()}
    timings = interleave(calls, baseline=PLAIN, rounds=rounds, seed=seed, device=device)
    memory = peaks({name: backward_of(layer, x) for name, layer in layers.items()}, device)
    return rows(what, timings, memory, goals={name: goal for name in layers if name.startswith("bnkit")}, notes=notes)


def _layer(x: Tensor) -> nn.Module:
    layer = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    return layer(x.shape[1], device=x.device).train()


def _bnkit(grouping: Any) -> _Maker:
    def make(layer: nn.Module, size: int) -> nn.Module:
        model = nn.Sequential(layer)
        bnkit.swap(model, Ghost(size, grouping))
        return layer

    return make


def _peers() -> tuple[dict[str, _Maker], dict[str, str]]:
    found: dict[str, _Maker] = {}
    missing = {"composer GhostBatchNorm": peers.NEEDS_TORCHVISION}
    gbn = peers.find("pytorch_tabnet.tab_network", "GBN")
    if gbn is None:
        missing["pytorch-tabnet GBN"] = peers.NOT_INSTALLED
    else:

        def make(layer: nn.Module, size: int) -> Callable[[Tensor], Tensor]:
            ghost = gbn(layer.num_features, virtual_batch_size=size, momentum=0.1).to(layer.weight.device)

            def call(x: Tensor) -> Tensor:  # it takes (N, C) and (N, C, L)
                output: Tensor = ghost(x) if x.dim() == 2 else ghost(x.flatten(2)).view_as(x)
                return output

            call.layer = ghost.bn  # type: ignore[attr-defined]
            return call

        found["pytorch-tabnet GBN"] = make
    return found, missing


def _wrong(layer: Callable[[Tensor], Tensor], x: Tensor, size: int) -> str:
    """What a ghost layer computes other than bnkit's, in words; empty where it is the same."""
    with torch.no_grad():
        output = layer(x).double()
    off = {grouping: float((output - expected(x, size, grouping)).abs().max()) for grouping in _GROUPINGS}
    said = [] if min(off.values()) < 1e-3 else ["computes something else: the output is neither grouping's"]
    norm: Any = getattr(layer, "layer", layer)
    mean = x.double().mean([d for d in range(x.dim()) if d != 1])
    step = float((norm.running_mean.double() / mean).median())
    if abs(step - norm.momentum) > 0.01:
        said.append(f"running mean goes {step:.0%} of the way in a step, not {norm.momentum:.0%}")
    return "; ".join(said)


def _limit(dimensions: int, channels_last: bool, compiled: bool) -> float:
    if compiled:
        return 1.3
    if dimensions == 2:
        return 2.0
    return 1.25 if channels_last else 1.05
