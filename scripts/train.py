"""Train, and see validation accuracy by the running average and by recalibrated statistics, side by side.

Usage::

    python scripts/train.py                                  # digits on the CPU, about a minute
    python scripts/train.py experiment=ema seed=1            # averaged weights
    python scripts/train.py swap=ghost                       # another BatchNorm, from conf/bnkit/swap
    python scripts/train.py data=fashion_mnist trainer=gpu data.batch_size=64
    python scripts/train.py --multirun data.batch_size=2,4,8,16 logger=csv
    python scripts/train.py ckpt_path=RUN_DIR/checkpoints/last.ckpt trainer.max_epochs=16
    python scripts/train.py --help                           # the groups and every value
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.training import run


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the job; return the metric that a hyperparameter search maximises."""
    return run(cfg).get(cfg.optimized_metric)


if __name__ == "__main__":
    main()
