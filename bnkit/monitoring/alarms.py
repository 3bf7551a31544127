"""Alarms in words: which layer, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

__all__ = ["Alarm", "AlarmBell", "Code"]

Code = Literal["shift", "stale", "dead", "nonfinite", "dropout"]

DEAD_FRACTION = 0.9
"""A layer is dead where at least so many of its channels are."""
DROPOUT_RATIO = 1.1
"""Dropout before a layer is worth a word where it changes the variance by this factor."""
TOGETHER = 5
"""What begins within so many steps has one cause."""


class Alarm(NamedTuple):
    """One alarm.

    Attributes:
        step: when it began.
        layer: the first layer, in the model's order, that shows it.
        code: what kind it is.
        score: how far beyond its limit, at least 1.
        message: layer, cause and cure in one sentence.
    """

    step: int
    layer: str
    code: Code
    score: float
    message: str


class AlarmBell:
    """Turns what was found into alarms: one for what has one cause, and none again while it lasts.

    Each kind is asked at every look, also where nothing was found: an alarm lasts from look to look, and then for
    ``silence`` steps more.

    Args:
        layers: names in the model's order, by which the first of several is told.
        silence: steps for which a layer that has raised an alarm raises no other of its kind.
    """

    def __init__(self, layers: Sequence[str], silence: int) -> None:
        self.alarms: list[Alarm] = []
        self._order = {name: position for position, name in enumerate(layers)}
        self._silence = silence
        self._silent_until: dict[tuple[str, str], int] = {}
        self._lasting: dict[str, list[str]] = {}
        self._last_shift = -TOGETHER - 1

    def state(self) -> dict[str, Any]:
        """Alarms and silences, for a checkpoint; see ``restore``."""
        return {
            "alarms": [tuple(alarm) for alarm in self.alarms],
            "silent": [(*key, until) for key, until in self._silent_until.items()],
            "lasting": {code: list(names) for code, names in self._lasting.items()},
            "last_shift": self._last_shift,
        }

    def restore(self, state: Mapping[str, Any], *, silences: bool = True) -> None:
        """Go on from a ``state``; without its silences where the layers are others."""
        self.alarms[:] = [Alarm(*alarm) for alarm in state["alarms"]]
        if silences:
            self._silent_until = {(code, layer): until for code, layer, until in state["silent"]}
            self._lasting = {code: list(names) for code, names in state["lasting"].items()}
            self._last_shift = state["last_shift"]

    def shift(self, found: Mapping[str, tuple[int, float]], steps: Mapping[int, int], now: int) -> None:
        """Layers whose batch statistics left their spread.

        Args:
            found: layer -> (position of its first exceedance, score).
            steps: position -> step.
            now: position of the last step looked at.
        """
        rest = self._not_silent("shift", found, now)
        # A layer behind one that was told of in the last look is late, not news.
        rest = [name for name in rest if found[name][0] > self._last_shift + TOGETHER]
        while rest:
            begin = min(found[name][0] for name in rest)
            self._last_shift = begin
            # Where it comes from is the first of the layers that show it within a few steps.
            together = [name for name in rest if found[name][0] <= begin + TOGETHER]
            rest = [name for name in rest if name not in together]
            first = together[0]
            score = found[first][1]
            self._raise(
                steps[begin],
                first,
                "shift",
                score,
                f"What reaches layer {first!r}{_others(together)} left its usual spread at step {steps[begin]}: "
                f"{self._where_from(first)}, and recalibrate before you evaluate.",
            )

    def _where_from(self, layer: str) -> str:
        """Cause and cure of a shift, by where it begins."""
        if self._order[layer] == 0:
            return (
                "it is the model's first BatchNorm layer, so the data have changed, or the weights before it; look at "
                "the batches since then (loader, augmentation, normalization of the input)"
            )
        return (
            "the BatchNorm layers registered before it are within theirs, so the weights or the layers just before it "
            "have jumped; look at what was frozen, loaded or swapped then, and at the learning rate"
        )

    def nonfinite(self, found: Mapping[str, int], steps: Mapping[int, int], now: int) -> None:
        """Layers with NaN or Inf in their batch statistics: layer -> position of the first."""
        together = self._not_silent("nonfinite", found, now)
        if together:
            begin = min(found[name] for name in together)
            first = next(name for name in together if found[name] == begin)
            self._raise(
                steps[begin],
                first,
                "nonfinite",
                1.0,
                f"Layer {first!r}{_others(together)} had NaN or Inf in its batch statistics from step {steps[begin]}: "
                "an input or a weight before it is not finite; check that batch, lower the learning rate or clip the "
                "gradients, under float16 use bfloat16, and recalibrate, since running statistics keep a NaN.",
            )

    def dead(self, found: Mapping[str, tuple[float, float, float]], step: int, now: int) -> None:
        """Layers of which most channels carry nothing on: layer -> (fraction, weight rms, bias rms)."""
        together = self._not_silent("dead", found, now)
        if together:
            first = together[0]  # what follows it starves
            fraction, weight, bias = found[first]
            self._raise(
                step,
                first,
                "dead",
                fraction / DEAD_FRACTION,
                f"Layer {first!r}{_others(together)} is dead in {fraction:.0%} of its channels (rms weight "
                f"{weight:.2g}, bias {bias:.2g}): its output is constant, or below zero throughout for a ReLU; lower "
                "its learning rate or weight decay, or initialise it and what comes before it anew.",
            )

    def stale(self, found: Mapping[str, tuple[float, float, float]], step: int, now: int) -> None:
        """Layers whose fixed statistics are off: layer -> (score, bias, noise)."""
        together = self._not_silent("stale", found, now)
        if together:
            first = together[0]
            score, bias, noise = found[first]
            self._raise(
                step,
                first,
                "stale",
                score,
                f"The fixed running statistics of layer {first!r}{_others(together)} do not fit what reaches it: they "
                f"are {bias:.2g} standard deviations off, {bias / noise:.2g} times a batch's own scatter; the weights "
                "before it or the data have changed since it was frozen: recalibrate it, or freeze it later.",
            )

    def dropout(self, found: Mapping[str, float], before: Callable[[str], str], step: int, now: int) -> None:
        """Layers whose variance dropout changes.

        Args:
            found: layer -> variance with over variance without.
            before: says of a layer which dropout is before it; may say nothing.
            step: of the probe.
            now: its position.
        """
        together = self._not_silent("dropout", found, now)
        if together:
            worst = max(together, key=lambda name: max(found[name], 1 / found[name]))
            ratio = found[worst]
            self._raise(
                step,
                worst,
                "dropout",
                max(ratio, 1 / ratio) / DROPOUT_RATIO,
                f"Layer {worst!r}{_others(together)} meets {ratio:.3g} times the variance in training that it would "
                f"without dropout{before(worst)}: at inference, which has none, its running variance does not fit; "
                "put dropout after the last BatchNorm, or recalibrate before evaluating, which switches dropout off.",
            )

    def _not_silent(self, code: Code, found: Iterable[str], now: int) -> list[str]:
        """Those that may raise an alarm, in the model's order; all of them are silent from now on."""
        names = sorted(found, key=self._order.__getitem__)
        lasting = self._lasting.get(code, []) if code != "shift" else []  # a shift is an event, the others are states
        loud = [name for name in names if name not in lasting and self._silent_until.get((code, name), -1) < now]
        for name in names:
            self._silent_until[code, name] = now + self._silence
        self._lasting[code] = names
        return loud

    def _raise(self, step: int, layer: str, code: Code, score: float, message: str) -> None:
        self.alarms.append(Alarm(step, layer, code, score, message))


def _others(together: Sequence[str]) -> str:
    others = len(together) - 1
    return f" (and {others} other layer{'s' if others > 1 else ''})" if others else ""
