from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig


@pytest.fixture
def job_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose the reference job, shortened to a few batches, with its run directory below tmp_path."""

    def composed(*overrides: str, run: str = "run", config: str = "train", short: bool = True) -> DictConfig:
        with initialize_config_module("bnkit.conf", version_base="1.3"):
            if config == "train":
                overrides = (
                    *(["debug=default", "logger=none"] if short else []),
                    f"run_dir={tmp_path / run}",
                    *overrides,
                )
            return compose(config, overrides=list(overrides))

    return composed
