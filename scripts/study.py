"""Compare BatchNorm's variants on Fashion-MNIST: every method at every batch size, over several seeds.

Usage::

    bnkit-study                          # goes on where it was stopped
    bnkit-study seeds=[0] & bnkit-study seeds=[1]    # two processes share one study
    bnkit-study only=[Ghost,Renorm] batch_sizes=[4]
    bnkit-study --help                   # the methods and every value

Or ``python scripts/study.py``, which needs no installed command.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="study")
def main(cfg: DictConfig) -> None:
    """Run what has no result yet, and print the table."""
    with told_plainly():
        from bnkit.training import run_study  # only now: --help need not wait for Lightning

        run_study(cfg)


if __name__ == "__main__":
    main()
