"""What a diagnosis finds, and how it reads in a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "name_some", "table"]

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first. error: training stops, or inference gives nothing of use; warning: results are probably worse than
they could be; info: worth knowing, and harmless where it is meant."""

_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One finding of [`bnkit.diagnose`][].

    Attributes:
        code: such as ``"BN101"``; [`bnkit.diagnosis.CODES`][] says what each means.
        severity: ``"error"``, ``"warning"`` or ``"info"``; one for each code.
        layers: names of the layers that it concerns, in the model's order.
        message: what was found and why it matters, in one sentence.
        cure: what to do about it, in one sentence.
    """

    code: str
    severity: Severity
    layers: tuple[str, ...]
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.code} ({self.severity}) in {name_some(self.layers)}: {self.message} {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """Strings and lists only, ready for JSON."""
        return asdict(self) | {"layers": list(self.layers)}


def table(findings: Iterable[Finding]) -> str:
    """The findings as plain text for a terminal, a paragraph each, with a closing line."""
    findings = list(findings)
    if not findings:
        return "Nothing found."
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.code}  {finding.severity:<7}  {name_some(finding.layers)}")
        for text in (finding.message, f"Cure: {finding.cure}"):
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 7, break_long_words=False
            )
    numbers = Counter(finding.severity for finding in findings)
    plural = {"error": "errors", "warning": "warnings", "info": "infos"}
    counted = [f"{numbers[s]} {s if numbers[s] == 1 else plural[s]}" for s in SEVERITIES if numbers[s]]
    return "\n".join([*lines, ", ".join(counted)])


def name_some(names: Sequence[str], most: int = 3) -> str:
    """The first few of the names, and how many there are more."""
    if not names:
        return "the model"
    some = names if len(names) <= most else names[: most - 1]
    rest = len(names) - len(some)
    return ", ".join(name or "the model itself" for name in some) + (f" and {rest} more layers" if rest else "")
