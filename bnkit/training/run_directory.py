"""What a run directory says of its job: who runs there, whether it has finished, and what it can go on from."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

if sys.platform != "win32":
    import fcntl

__all__ = [
    "RESULT_NAME",
    "alone_in",
    "finished",
    "last_checkpoint",
    "metrics_so_far",
    "refuse_the_checkpoint_of_another_job",
    "save_result",
]

log = logging.getLogger(__name__)

RESULT_NAME = "result.json"
"""In the run directory of a finished job: its metrics and its config."""
LOCK_NAME = ".lock"
"""In a run directory: held by the process whose job runs there."""

_NOT_OF_THE_JOB = ("run_dir", "ckpt_path", "resume")
_MAY_CHANGE = ("trainer", "logger", "test", "threads", "optimized_metric")
"""What a job that goes on may have otherwise than before: how long, where and what for, but not what it trains."""


@contextmanager
def alone_in(run_dir: str | Path) -> Iterator[None]:
    """Wait until no other process runs a job in ``run_dir``, and let none in meanwhile.

    When a sweep is killed, the jobs that joblib, submitit or SLURM runs for it live on; a relaunched sweep would write
    into the same directories. Where files cannot be locked (Windows, some network file systems) there is no such wait.

    Raises:
        RuntimeError: where another process runs there and this one is rank 0 of several, which cannot wait.
    """
    if sys.platform == "win32" or (getattr(rank_zero_only, "rank", None) or 0) > 0:
        yield
        return
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with (Path(run_dir) / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            where = f"{run_dir} is in use: {file.read().strip() or 'another process'} runs a job there"
            if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
                raise RuntimeError(
                    f"{where}, and the other ranks of this one cannot wait for it; start again when it has ended, or "
                    "choose another directory."
                ) from None
            log.info("%s; waiting for its end.", where)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks on this file system
            yield
            return
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do while a forked process has the file too


def finished(cfg: DictConfig) -> dict[str, float] | None:
    """The metrics of this very job, if it has finished in ``cfg.run_dir`` before; else None."""
    path = Path(cfg.run_dir) / RESULT_NAME
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return dict(result["metrics"]) if result["config"] == _of_the_job(cfg) else None


def save_result(cfg: DictConfig, metrics: Mapping[str, float]) -> None:
    """Leave the metrics of a finished job in its run directory; whole or not at all."""
    path = Path(cfg.run_dir) / RESULT_NAME
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({"metrics": dict(metrics), "config": _of_the_job(cfg)}, indent=1), encoding="utf-8")
    partial.replace(path)


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint to go on from in a run directory; None where there is none."""
    path = Path(run_dir) / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def metrics_so_far(checkpoint: Path) -> dict[str, float]:
    """What had been logged when a checkpoint of this job was saved, by ``MetricsSoFar``."""
    return dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("metrics_so_far", {}))


@rank_zero_only
def refuse_the_checkpoint_of_another_job(cfg: DictConfig, path: Path) -> None:
    """Stop before a job goes on from what another one left in the same directory.

    A sweep that is started again with other values, or by a sweeper that chooses others, would do so job by job.

    Args:
        cfg: the job's config.
        path: the config of the job that left the checkpoint; where there is none, nothing can be said.

    Raises:
        ValueError: where it trains something else.
    """
    if not path.is_file():
        return
    before = OmegaConf.load(path)
    assert isinstance(before, DictConfig)
    there, here = (
        dict(_leaves({key: value for key, value in _of_the_job(each).items() if key not in _MAY_CHANGE}))
        for each in (before, cfg)
    )
    changes = [
        f"{key} is {there.get(key, 'not there')} there and {here.get(key, 'not there')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key, "not there") != here.get(key, "not there")
    ]
    if changes:
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        raise ValueError(
            f"{cfg.run_dir} has the checkpoint of another job: {', '.join(changes[:3])}{more}. Choose another "
            "directory, start anew in this one with resume=false, or go on from it all the same with "
            f"ckpt_path={cfg.run_dir}/checkpoints/last.ckpt."
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a dict, by its name on the command line."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _of_the_job(cfg: DictConfig) -> Any:
    """The config without what says where and how often it runs, as JSON would give it back."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    run_dir = str(values["run_dir"])
    kept = {key: value for key, value in values.items() if key not in _NOT_OF_THE_JOB}
    return json.loads(json.dumps(kept, sort_keys=True).replace(json.dumps(run_dir)[1:-1], "RUN_DIR"))
