"""Recalibrate the BatchNorm statistics in a saved checkpoint; a new checkpoint is written beside it.

Usage::

    bnkit-recalibrate ckpt=RUN_DIR/checkpoints/last.ckpt
    bnkit-recalibrate ckpt=RUN_DIR/checkpoints/last.ckpt batch_size=256 recalibration.max_samples=null
    bnkit-recalibrate ckpt=RUN_DIR/checkpoints/last.ckpt data=fashion_mnist
    bnkit-recalibrate --help    # every value

Or ``python scripts/recalibrate.py``, which needs no installed command.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="recalibrate")
def main(cfg: DictConfig) -> None:
    """Write the recalibrated checkpoint."""
    with told_plainly():
        from bnkit.training import recalibrate_checkpoint  # only now: --help need not wait for Lightning

        recalibrate_checkpoint(cfg)


if __name__ == "__main__":
    main()
