"""The watch: from what a snapshot measured to alarms, by what was learnt of the layers before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnkit.monitoring.alarms import DEAD_FRACTION, Alarm, AlarmBell
from bnkit.monitoring.charts import ShiftChart
from bnkit.monitoring.dropout_comparison import worth_a_word
from bnkit.monitoring.input_samples import InputSample, stale_statistics
from bnkit.monitoring.snapshot import LayerMeasures

__all__ = ["AlarmWatch", "SeenStep"]


class SeenStep(NamedTuple):
    """A step since the last snapshot."""

    position: int  # how many steps came before it
    step: int
    samples: int | None


class AlarmWatch:
    """Judges each snapshot against the layers' own past, and keeps the alarms.

    Args:
        layers: names in the model's order.
        rate: of false alarms a step, over all layers.
        window: steps that a layer's usual spread is learnt from.
    """

    def __init__(self, layers: Sequence[str], *, rate: float, window: int) -> None:
        self._layers, self._rate = tuple(layers), rate
        self._chart = ShiftChart(len(self._layers), rate=rate, window=window)
        self._bell = AlarmBell(self._layers, silence=window)
        self._weights: dict[str, float] = {}  # rms by layer, at the last snapshot

    @property
    def alarms(self) -> list[Alarm]:
        """All so far."""
        return self._bell.alarms

    def look(
        self,
        layers: Mapping[str, LayerMeasures],
        kl: Tensor,
        nonfinite: Mapping[str, int],
        samples: Mapping[str, Sequence[InputSample]],
        seen: Sequence[SeenStep],
    ) -> tuple[Alarm, ...]:
        """Raise the alarms of the steps since the last look, and return them.

        Args:
            layers: what was measured of each.
            kl: of each step and layer, (K, L), on the CPU; NaN where not known.
            nonfinite: layer -> position of its first step with NaN or Inf.
            samples: of the layers whose inputs are reduced.
            seen: the K steps.
        """
        first = len(self.alarms)
        now, step = seen[-1].position, seen[-1].step
        steps = {one.position: one.step for one in seen}
        scores = self._chart.update(kl * _per_sample(seen))
        shifted = {}
        for index, name in enumerate(self._layers):
            beyond = (scores[:, index] > 1).nonzero().flatten().tolist()
            if beyond and name not in nonfinite:
                shifted[name] = (seen[beyond[0]].position, float(scores[beyond, index].max()))
        self._bell.shift(shifted, steps, now)
        self._bell.nonfinite(nonfinite, steps, now)
        dead = {
            name: (measures.dead_fraction, measures.weight, measures.bias)
            for name, measures in layers.items()
            if measures.dead_fraction >= DEAD_FRACTION and not self._is_growing(name, measures.weight)
        }
        self._bell.dead(dead, step, now)
        # Asked once a look, for all layers.
        rate = min(0.1, self._rate * len(seen) / max(1, len(self._layers)))
        self._bell.stale(stale_statistics(samples, rate), step, now)
        self._weights = {name: measures.weight for name, measures in layers.items()}
        return tuple(self.alarms[first:])

    def dropout(self, shifts: Mapping[str, float], before: Callable[[str], str], step: int, now: int) -> None:
        """Raise the alarm of dropout that changes the variance that layers meet; see ``AlarmBell.dropout``."""
        self._bell.dropout(worth_a_word(shifts), before, step, now)

    def state(self) -> dict[str, Any]:
        """What it has learnt, and the alarms, for a checkpoint; see ``restore``."""
        return {"chart": self._chart.state(), "bell": self._bell.state(), "weights": dict(self._weights)}

    def restore(self, state: Mapping[str, Any], *, same_layers: bool) -> None:
        """Go on from a ``state``; of other layers only the alarms are kept."""
        self._bell.restore(state["bell"], silences=same_layers)
        if same_layers:
            self._chart.restore(state["chart"])
            self._weights = dict(state["weights"])

    def _is_growing(self, name: str, weight: float) -> bool:
        """Whether a layer has hardly any weight yet, as layers have that are made with a weight of 0 on purpose."""
        return weight < 1e-2 and not weight <= 1.1 * self._weights.get(name, math.nan)


def _per_sample(seen: Sequence[SeenStep]) -> Tensor:
    """(K, 1): what the divergence of each step is multiplied by; it goes with one over the samples."""
    if all(one.samples is None for one in seen):
        return torch.ones(len(seen), 1, dtype=torch.float64)
    return torch.tensor([[one.samples or math.nan] for one in seen], dtype=torch.float64)
