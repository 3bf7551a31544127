"""What a job must know of how its processes were started."""

from __future__ import annotations

import multiprocessing
import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

__all__ = ["forget_loky", "forget_the_last_port", "is_multirun", "refuse_processes_that_repeat_the_sweep"]


def is_multirun() -> bool:
    """Whether this is a job of a sweep: Hydra's ``--multirun``."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def refuse_processes_that_repeat_the_sweep(trainer: Trainer) -> None:
    """Stop before rank 1 runs the sweep's other jobs, or a later job trains on a part of its data unnoticed.

    Raises:
        ValueError: where the trainer would start its processes by running the script again, in a sweep.
    """
    launcher = trainer.strategy.launcher
    starts = isinstance(launcher, _SubprocessScriptLauncher) and not (
        launcher.cluster_environment.creates_processes_externally  # as under torchrun and SLURM
    )
    if is_multirun() and starts:
        raise ValueError(
            "trainer.strategy=ddp starts its processes by running this script again, which under --multirun would run "
            "the whole sweep in each; use trainer=ddp_spawn, or start every process yourself with torchrun."
        )


def forget_loky() -> None:
    """In a worker of joblib, start processes as everywhere else; by joblib's own method a spawned one cannot begin."""
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        multiprocessing.set_start_method(None, force=True)


def forget_the_last_port(trainer: Trainer) -> None:
    """In a sweep, let a job that starts its own processes choose their port anew.

    Lightning leaves the port in the environment, which jobs that run at a time may have from one parent: processes of
    two jobs would meet there, and the others wait for ever.
    """
    if is_multirun() and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        os.environ.pop("MASTER_PORT", None)
