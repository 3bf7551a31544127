"""Rules by when they begin."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bnkit.norms import Spec
from bnkit.rules import Match, match, parse_rules, unused

__all__ = ["Key", "RulesConfig", "Schedule", "warn"]

warn = functools.partial(rank_zero_warn, stacklevel=10)
"""Warn on rank 0, from where the user called the trainer or near it: the frames between are Lightning's and bnkit's."""

Key = int | float
"""When rules begin: an epoch, or a fraction of all epochs; 0 is the start."""

RulesConfig = Spec | str | Mapping[str, Spec | str | None] | None
"""Rules, or what a config file says instead. LightningCLI checks a config by this type; it builds the specs itself."""


class Schedule:
    """The rules of the start and those that begin later, each on top of those before.

    Args:
        rules: of the start; None swaps nothing.
        later: by epoch, or by fraction of all epochs; None makes the layers plain again.

    Raises:
        TypeError, ValueError: rules that are none, and keys that are neither an epoch nor a fraction.
    """

    def __init__(self, rules: Any, later: Mapping[Any, Any] | None) -> None:
        self._stages: dict[Key, dict[str, Spec | None] | None] = {0: parse_rules(rules) or {}}
        self._starts: dict[Key, int] = {0: 0}
        for given, value in (later or {}).items():
            key = _key(given)
            if key in self._stages:
                raise ValueError(f"The schedule has {given!r} twice.")
            self._stages[key] = parse_rules(value)

    @property
    def is_scheduled(self) -> bool:
        """Whether anything begins after the start."""
        return len(self._stages) > 1

    @property
    def start(self) -> tuple[Key, ...]:
        """The stage before anything scheduled has begun."""
        return (0,)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return any(self._stages.values())

    def specs(self) -> Iterator[Spec]:
        """All specs of all rules."""
        for rules in self._stages.values():
            yield from (spec for spec in (rules or {}).values() if spec is not None)

    def resolve(self, max_epochs: int | None) -> None:
        """Turn fractions into epochs.

        Raises:
            ValueError: for a fraction of no known number of epochs, and for two keys that are the same epoch.
        """
        starts: dict[Key, int] = {}
        for key in self._stages:
            if isinstance(key, float):
                if max_epochs is None or max_epochs < 0:
                    raise ValueError(
                        f"The schedule's {key} is a fraction of max_epochs, which the trainer does not have: "
                        "set Trainer(max_epochs=...), or give the epoch as an int."
                    )
                # A hair less, so that 0.55 of 100 epochs is 55.
                starts[key] = math.ceil(key * max_epochs - 1e-9)
            else:
                starts[key] = key
        for key, epoch in starts.items():
            same = [str(other) for other, start in starts.items() if start == epoch]
            # In a run cut short (fast_dev_run) several may be at its end, which is never reached.
            if len(same) > 1 and (max_epochs is None or max_epochs < 0 or epoch < max_epochs):
                raise ValueError(f"The schedule's {' and '.join(same)} are both epoch {epoch}.")
            if max_epochs is not None and 0 <= max_epochs <= epoch and key:
                warn(f"The schedule's rules for {key} begin at epoch {epoch}, and training ends before it.")
        self._starts = starts

    def due(self, epoch: int | None) -> tuple[Key, ...]:
        """The stages that have begun by an epoch, in order; None: all."""
        due = [key for key, start in self._starts.items() if epoch is None or start <= epoch]
        return tuple(sorted(due, key=lambda key: self._starts[key]))

    def rules_after(self, stages: Iterable[Key], names: Iterable[str]) -> dict[str, Match]:
        """The rule that each layer has after these stages; layers that none is for are missing."""
        names, found = list(names), dict[str, Match]()
        for key in stages:
            rules = self._stages[key]
            if rules is None:
                found = {}
            else:
                matches = match(rules, names)
                found |= {name: rule for name, rule in matches.items() if rule.spec is not None}
        return found

    def warn_of_unused(self, names: Iterable[str]) -> None:
        """Warn of each pattern that no layer falls under."""
        names = list(names)
        for rules in self._stages.values():
            for problem in unused(rules or {}, names):
                warn(problem)

    def to_dict(self) -> dict[str, Any]:
        """The rules of each stage as strings, for a checkpoint."""
        return {
            str(key or "start"): "plain" if rules is None else {pattern: str(spec) for pattern, spec in rules.items()}
            for key, rules in self._stages.items()
        }


def _key(given: Any) -> Key:
    """An int of at least 1, or a float between 0 and 1; YAML and the command line may give strings."""
    key: Any = given
    if isinstance(given, str):
        try:
            key = int(given)
        except ValueError:
            try:
                key = float(given)
            except ValueError:
                key = None
    if isinstance(key, int) and not isinstance(key, bool) and key >= 1:
        return key
    if isinstance(key, float) and 0 < key < 1:
        return key
    raise ValueError(
        f"A schedule's key is an epoch (an int of at least 1) or a fraction of max_epochs (a float between 0 and 1), "
        f"not {given!r}."
    )
