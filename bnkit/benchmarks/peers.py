"""What people would use instead: found where it is installed, named where it is not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["NEEDS_TORCHVISION", "NOT_INSTALLED", "find", "outcome"]

NOT_INSTALLED = 'not installed (pip install "bnkit[bench]")'
NEEDS_TORCHVISION = "not tried: it requires torchvision, which bnkit's environment leaves out"


def find(module: str, name: str) -> Any | None:
    """A peer's own function or class; None where its package is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def outcome(call: Callable[[], object]) -> str:
    """Why a peer fails, in a line; empty where it does not."""
    try:
        call()
    except Exception as error:  # whatever another package raises is what is to be told
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return ""
