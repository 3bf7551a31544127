"""What bnkit costs, beside what it is compared with, in one run; see ``scripts/benchmark.py``."""

from __future__ import annotations

import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bnkit.benchmarks.monitor import compare_monitors
from bnkit.benchmarks.timing import Timings

__all__ = ["run", "table"]

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure as ``conf/benchmark.yaml`` says, print the table, and write it as JSON to ``cfg.output``.

    Raises:
        ValueError: for an unknown ``cfg.bench``.
    """
    if cfg.bench != "monitor":
        raise ValueError(f"bench={cfg.bench} is unknown; there is bench=monitor.")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    timings, facts = compare_monitors(
        width=cfg.width,
        depths=tuple(cfg.depths),
        batch_size=cfg.batch_size,
        pixels=cfg.pixels,
        steps=cfg.steps,
        rounds=cfg.rounds,
        device=cfg.device,
        seed=cfg.seed,
    )
    log.info("%s", table(timings))
    for name, value in facts.items():
        log.info("%s: %.4g", name, value)
    result = {
        "bench": cfg.bench,
        **timings.to_dict(),
        **facts,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2))
    log.info("Written to %s", output)
    return result


def table(timings: Timings) -> str:
    """A plain-text table of the ratios over the baseline: median, and 5th to 95th percentile of the rounds."""
    names = [name for name in timings.cpu if name != timings.baseline]
    width = max(map(len, names))
    lines = [f"{'over ' + timings.baseline:{width}}  {'CPU time':>24}  {'wall time':>24}"]
    lines += [
        f"{name:{width}}  {timings.ratio(name, 'cpu')!s:>24}  {timings.ratio(name, 'wall')!s:>24}" for name in names
    ]
    return "\n".join(lines)
