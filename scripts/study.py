"""Compare BatchNorm's variants on Fashion-MNIST: every method at every batch size, over several seeds.

Usage::

    python scripts/study.py                          # goes on where it was stopped
    python scripts/study.py seeds=[0] & python scripts/study.py seeds=[1]    # two processes share one study
    python scripts/study.py only=[ghost,renorm] batch_sizes=[4]
    python scripts/study.py --help                   # the methods and every value
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.training import run_study


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="study")
def main(cfg: DictConfig) -> None:
    """Run what has no result yet, and print the table."""
    run_study(cfg)


if __name__ == "__main__":
    main()
