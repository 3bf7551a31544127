"""Say what is wrong with a model's BatchNorm layers: findings, each with its cause and its cure.

Usage::

    bnkit-diagnose ckpt=RUN_DIR/checkpoints/last.ckpt          # a checkpoint of bnkit-train
    bnkit-diagnose model=resnet data=digits batch_size=2       # a model of the configs, before it is trained
    bnkit-diagnose model._target_=my_project.Net batch_size=4 world_size=8
    bnkit-diagnose --help                                      # every value

Or ``python scripts/diagnose.py``, which needs no installed command.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="diagnose")
def main(cfg: DictConfig) -> None:
    """Print the findings."""
    with told_plainly():
        from bnkit.training.diagnosis import diagnose_config  # only now: --help need not wait for Lightning

        diagnose_config(cfg)


if __name__ == "__main__":
    main()
