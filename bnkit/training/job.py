"""The reference job: build everything from a config, train, test, and leave the results in the run directory."""

from __future__ import annotations

import csv
import logging
import os
import secrets
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from bnkit.training.launching import (
    forget_loky,
    forget_the_last_port,
    is_multirun,
    refuse_processes_that_repeat_the_sweep,
)
from bnkit.training.resuming import AtomicCheckpointIO, MetricsSoFar, RandomStates, SigtermEndsTheFit
from bnkit.training.run_directory import (
    alone_in,
    finished,
    last_checkpoint,
    metrics_so_far,
    refuse_the_checkpoint_of_another_job,
    save_result,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
"""The resolved config in a run directory."""
WANDB_ID_NAME = "wandb_id.txt"
"""The id of the job's W&B run, by which a resumed job logs to the same one."""


def run(cfg: DictConfig) -> dict[str, float]:
    """Train and test as ``cfg`` says.

    A job that was stopped goes on from the last checkpoint in ``cfg.run_dir``, and one that has finished there is not
    run again, unless ``cfg.resume`` is false. Where another process runs a job in that directory, it waits for its end.

    Args:
        cfg: ``conf/train.yaml``, composed. ``cfg.run_dir`` gets the resolved config, the checkpoints, the logs, and at
            the end the result.

    Returns:
        The metrics logged last, by name, those of the test among them; ``<monitor>_best`` is the best checkpoint's, by
        the metric that the checkpoint callback monitors.

    Raises:
        FileNotFoundError: When ``cfg.ckpt_path`` does not exist.
        SystemExit: When the job was stopped by SIGTERM.
        ValueError: When the trainer would start its processes by running the script again, under ``--multirun``; when
            the checkpoint in ``cfg.run_dir`` is of another job; when W&B is online but there is no key.
    """
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path} does not exist; nothing to resume from.")
    with alone_in(cfg.run_dir):
        return _run(cfg)


def _run(cfg: DictConfig) -> dict[str, float]:
    done = finished(cfg) if cfg.resume else None
    if done is not None:
        log.info("Finished before, in %s; resume=false runs it again.", _relative(cfg.run_dir))
        return done
    checkpoint_path, before = cfg.ckpt_path, {}
    if checkpoint_path is None and cfg.resume and (last := last_checkpoint(cfg.run_dir)):
        refuse_the_checkpoint_of_another_job(cfg, Path(cfg.run_dir) / CONFIG_NAME)
        checkpoint_path, before = last, metrics_so_far(last)
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule: LightningDataModule = instantiate(cfg.data)
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    callbacks = [*_callbacks(cfg.callbacks), RandomStates(), MetricsSoFar(), SigtermEndsTheFit()]
    loggers = _instances(cfg.logger)
    _name_runs(cfg, loggers)
    trainer: Trainer = instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        callbacks=callbacks,
        logger=loggers or False,
        default_root_dir=cfg.run_dir,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    refuse_processes_that_repeat_the_sweep(trainer)
    forget_loky()
    forget_the_last_port(trainer)
    with _wandb_ends_with_the_job(loggers), _threads(cfg.threads), warnings.catch_warnings():
        _ignore_what_does_not_apply()
        _save_config(cfg, loggers)
        if checkpoint_path is not None:
            log.info("Going on from %s", _relative(checkpoint_path))
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint_path)
        except SIGTERMException:  # of itself an exit without a failure
            log.info("Stopped; the same command with hydra.run.dir=%s goes on.", _relative(cfg.run_dir))
            raise SystemExit(128 + signal.SIGTERM) from None
        _learn_columns(loggers)
        metrics = before | _floats(trainer.callback_metrics)
        checkpoint = trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
            metrics[f"{checkpoint.monitor}_best"] = float(checkpoint.best_model_score)
        if cfg.test:
            if best:
                # not by test(ckpt_path=...): after a fit with weight averaging, Lightning loads the weights of the last
                # step from there and not the averaged ones, which were validated
                module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
            trainer.test(module, datamodule=datamodule, verbose=False)
            metrics |= _floats(trainer.callback_metrics)
        _report(cfg, loggers, best, metrics)
        if trainer.is_global_zero:
            save_result(cfg, metrics)
    return metrics


def _instances(group: DictConfig | None) -> list[Any]:
    """Build each entry of a config group; an entry set to null is left out."""
    return [instantiate(entry, _convert_="all") for entry in (group or {}).values() if entry is not None]


def _callbacks(group: DictConfig | None) -> list[Callback]:
    """Build the callbacks; a progress bar, which draws over itself, only where there is a terminal to draw on."""
    terminal = sys.stdout.isatty()
    return [callback for callback in _instances(group) if terminal or not isinstance(callback, ProgressBar)]


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@contextmanager
def _wandb_ends_with_the_job(loggers: list[Logger]) -> Iterator[None]:
    """Finish the job's W&B run, as failed where it fails: the next job of a sweep would log into it otherwise."""
    if not any(isinstance(logger, WandbLogger) for logger in loggers):
        yield
        return
    import wandb  # only now: a job without W&B need not pay for the import

    mode = os.environ.get("WANDB_MODE")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _require_wandb_key(logger)
            logger._wandb_init.pop("anonymous", None)  # W&B warns of it; Lightning passes it even when it is not set
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code=exit_code)
        if mode is None:  # WandbLogger(offline=True) sets it, for every run of the process
            os.environ.pop("WANDB_MODE", None)
        else:
            os.environ["WANDB_MODE"] = mode


def _name_runs(cfg: DictConfig, loggers: list[Logger]) -> None:
    """Let a job that goes on log to the W&B run of before, keep its older table, and group the jobs of a sweep."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            _keep_table(Path(logger.log_dir) / "metrics.csv")
        if isinstance(logger, WandbLogger):
            name = Path(cfg.run_dir) / WANDB_ID_NAME
            if logger._wandb_init.get("id") is None:
                logger._wandb_init["id"] = _run_id(name, new=not cfg.resume)
                logger._wandb_init["resume"] = "allow"
            if is_multirun() and logger._wandb_init.get("group") is None:
                logger._wandb_init["group"] = Path(HydraConfig.get().sweep.dir).name


def _run_id(path: Path, *, new: bool) -> str:
    """The id of the job's W&B run: that of before, or a new one."""
    if not new and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    if getattr(rank_zero_only, "rank", 0):
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = secrets.token_hex(4)
    path.write_text(chosen, encoding="utf-8")
    return chosen


@rank_zero_only
def _keep_table(table: Path) -> None:
    """Put the table of the job's earlier part aside: CSVLogger deletes what it finds."""
    if table.is_file():
        part = 1 + len(list(table.parent.glob("metrics_part_*.csv")))
        table.rename(table.with_name(f"metrics_part_{part}.csv"))


@rank_zero_only
def _require_wandb_key(logger: WandbLogger) -> None:
    """Raise where W&B would stop the job to ask for a key."""
    import wandb

    online = not logger._offline and os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    if online and not wandb.login(prompt=False):
        raise ValueError(
            "logger.wandb.offline=false needs a W&B key and there is none: run `wandb login` or set WANDB_API_KEY, or "
            "leave the run offline and send it later with `wandb sync`."
        )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Compute with ``number`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ignore_what_does_not_apply() -> None:
    # The images are in memory: worker processes would make loading slower, not faster.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Where a job goes on, what was there before is meant to be there; the older table has been put aside.
    warnings.filterwarnings("ignore", message=".*directory .* exists and is not empty")
    # Lightning's own use of a torch name that torch has deprecated since.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)


@rank_zero_only
def _save_config(cfg: DictConfig, loggers: list[Logger]) -> None:
    """Leave the resolved config in the run directory, and with every logger."""
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / CONFIG_NAME, resolve=True)
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    for logger in loggers:
        logger.log_hyperparams(values)  # type: ignore[arg-type]


@rank_zero_only
def _learn_columns(loggers: list[Logger]) -> None:
    """Tell a CSV logger the columns of its file; those that its copy in a spawned process wrote it does not know."""
    for logger in loggers:
        if isinstance(logger, CSVLogger) and (table := Path(logger.log_dir, "metrics.csv")).is_file():
            with table.open(newline="") as file:
                logger.experiment.metrics_keys = next(csv.reader(file))


@rank_zero_only
def _report(cfg: DictConfig, loggers: list[Logger], best: str, metrics: dict[str, float]) -> None:
    """Say what came out and where it is."""
    if "test/accuracy" in metrics:
        subject = "best checkpoint" if best else "last weights"
        log.info("Test accuracy of the %s: %.1f %%", subject, 100 * metrics["test/accuracy"])
    if best:
        log.info("Best checkpoint: %s", _relative(best))
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            directory = Path(logger.experiment.dir).parent
            log.info("W&B run: %s (send it with: wandb sync %s)", logger.experiment.id, _relative(directory))
    log.info("All results: %s", _relative(cfg.run_dir))


def _relative(path: str | Path) -> str:
    """Shorten ``path`` where it is below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
