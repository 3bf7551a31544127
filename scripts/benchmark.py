"""What bnkit costs, as ratios in one run: interleaved, in random order.

Usage::

    bnkit-benchmark                              # the monitor, at 20 and at 102 BatchNorm layers
    bnkit-benchmark bench=recalibration          # also ghost, sync, swap, import, scaling
    bnkit-benchmark bench=all output_markdown=benchmarks.md
    bnkit-benchmark depths=[2,2,2,2] pixels=28 batch_size=64 rounds=40
    bnkit-benchmark --help                       # every value

Or ``python scripts/benchmark.py``, which needs no installed command.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, print tables, and write them as JSON and as pictures."""
    with told_plainly():
        from bnkit.benchmarks import run  # only now: --help need not wait for torch

        run(cfg)


if __name__ == "__main__":
    main()
