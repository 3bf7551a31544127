"""The list of rules: one entry a code, from which the findings and the documents are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.finding import Finding, Severity

__all__ = ["CODES", "Found", "Needs", "Rule", "rule"]

Needs = Literal["", "batch_size", "world_size", "optimizer", "sample"]


@dataclass(frozen=True)
class Found:
    """What a rule found, once for all layers with one cause.

    Attributes:
        layers: their names, in the model's order; none where it concerns the model as a whole.
        message: what was found in them, with its numbers, and why it matters.
        cure: in place of the rule's own, where that does not fit here.
    """

    layers: Sequence[str]
    message: str
    cure: str = ""


@dataclass(frozen=True)
class Rule:
    """What one code means.

    Attributes:
        code: ``"BN"`` and three digits; the first is the family's.
        severity: of all its findings.
        title: the fault, in a few words.
        cause: why it matters.
        cure: what to do, in one sentence.
        needs: the argument of [`bnkit.diagnose`][] without which the rule knows nothing; empty: none.
        find: looks for it.
    """

    code: str
    severity: Severity
    title: str
    cause: str
    cure: str
    needs: Needs
    find: Callable[[Case], Iterator[Found]]

    def findings(self, case: Case) -> Iterator[Finding]:
        """What the rule finds in this case."""
        for found in self.find(case):
            yield Finding(self.code, self.severity, tuple(found.layers), found.message, found.cure or self.cure)


CODES: dict[str, Rule] = {}
"""Every rule by its code, in order; filled by ``rule`` as the families are imported."""


def rule(
    code: str, severity: Severity, title: str, *, cause: str, cure: str, needs: Needs = ""
) -> Callable[[Callable[[Case], Iterator[Found]]], Callable[[Case], Iterator[Found]]]:
    """Make a function from a ``Case`` to what it found there the rule of a code; see [`bnkit.diagnosis.Rule`][].

    Raises:
        ValueError: for a code that is taken.
    """

    def register(find: Callable[[Case], Iterator[Found]]) -> Callable[[Case], Iterator[Found]]:
        if code in CODES:
            raise ValueError(f"{code} is taken already, by {CODES[code].title!r}.")
        CODES[code] = Rule(code, severity, title, cause, cure, needs, find)
        return find

    return register
