"""The kind of machine and the versions that a benchmark ran with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["PACKAGES", "describe"]

PACKAGES = ("bnkit", "torch", "lightning", "wandb", "fvcore", "pytorch-tabnet")
"""Whose versions are noted, where they are installed."""


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, threads, accelerator, versions and the date; nothing that tells one machine from its like."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """Linux names it in /proc only."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
