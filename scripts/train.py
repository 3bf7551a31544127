"""Train, and see validation accuracy by the running average and by recalibrated statistics, side by side.

Usage::

    bnkit-train                                  # digits on the CPU, about a minute
    bnkit-train experiment=ema seed=1            # averaged weights
    bnkit-train swap=ghost                       # another BatchNorm, from conf/bnkit/swap
    bnkit-train data=fashion_mnist trainer=gpu data.batch_size=64
    bnkit-train --multirun data.batch_size=2,4,8,16 logger=csv
    bnkit-train ckpt_path=RUN_DIR/checkpoints/last.ckpt trainer.max_epochs=16
    bnkit-train --help                           # the groups and every value

Or ``python scripts/train.py``, which needs no installed command.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import names_missing_plugins, told_plainly


@names_missing_plugins
@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the job; return the metric that a hyperparameter search maximises."""
    with told_plainly():
        from bnkit.training import run  # only now: --help need not wait for Lightning

        return run(cfg).get(cfg.optimized_metric)


if __name__ == "__main__":
    main()
