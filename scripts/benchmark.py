"""What bnkit costs, as ratios in one run: interleaved, in random order.

Usage::

    python scripts/benchmark.py                              # monitor: about two minutes on a CPU
    python scripts/benchmark.py depths=[12,12,12,13]         # 102 BatchNorm layers
    python scripts/benchmark.py batch_size=64 pixels=28 rounds=40
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.benchmarks import run


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, print a table and write it as JSON."""
    run(cfg)


if __name__ == "__main__":
    main()
