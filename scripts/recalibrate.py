"""Recalibrate the BatchNorm statistics in a saved checkpoint; a new checkpoint is written beside it.

Usage::

    python scripts/recalibrate.py ckpt=RUN_DIR/checkpoints/last.ckpt
    python scripts/recalibrate.py ckpt=RUN_DIR/checkpoints/last.ckpt batch_size=256 recalibration.max_samples=null
    python scripts/recalibrate.py ckpt=RUN_DIR/checkpoints/last.ckpt data=fashion_mnist
    python scripts/recalibrate.py --help    # every value
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.training import recalibrate_checkpoint


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="recalibrate")
def main(cfg: DictConfig) -> None:
    """Write the recalibrated checkpoint."""
    recalibrate_checkpoint(cfg)


if __name__ == "__main__":
    main()
