"""Numbers and counts as people read them."""

from __future__ import annotations

import math

from bnkit.dashboard.history import Cell

__all__ = ["UNKNOWN", "count", "number", "percent"]

UNKNOWN = "unknown"
_MINUS, _TIMES = "\u2212", "\u00d7"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Cell) -> str:
    """A cell in words: three significant digits, no needless exponent, and never a 0 for what is not known.

    Examples:
        >>> [number(value) for value in (0.12345, 12345.6, 1200, True, None)]
        ['0.123', '12,346', '1,200', 'yes', 'unknown']
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    return _real(value).replace("-", _MINUS)


def _real(value: float) -> str:
    if value == 0:
        return "0"
    magnitude = abs(value)
    if 1e-3 <= magnitude < 1000:
        return f"{value:.3g}" if magnitude < 999.5 else f"{value:,.0f}"
    if 1000 <= magnitude < 1e9:
        return f"{value:,.0f}"
    digits, exponent = f"{value:.2e}".split("e")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def percent(value: float | None) -> str:
    """A fraction in per cent.

    Examples:
        >>> percent(0.0345), percent(0.0), percent(None)
        ('3.45 %', '0 %', 'unknown')
    """
    return UNKNOWN if value is None else f"{number(100 * value)} %"


def count(of: int, one: str, many: str | None = None) -> str:
    """A count and its noun.

    Examples:
        >>> count(1, "layer"), count(3, "layer"), count(0, "alarm")
        ('1 layer', '3 layers', 'no alarms')
    """
    noun = one if of == 1 else many or f"{one}s"
    return f"{of:,} {noun}" if of else f"no {noun}"
