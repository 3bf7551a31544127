"""What it takes for a stopped job to go on as if it had not been stopped, and for a finished one not to run again."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from bnkit import ranks

if sys.platform != "win32":
    import fcntl

__all__ = [
    "RESULT_NAME",
    "AtomicCheckpointIO",
    "MetricsSoFar",
    "RandomStates",
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


class RandomStates(Callback):
    """Keeps every rank's random states in the checkpoint, and gives them back where training resumes.

    Lightning restores weights, optimizers and loops, but a resumed fit would shuffle and augment by other numbers. It
    is for checkpoints at the end of an epoch. Where the number of ranks is another one, each keeps its own states.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Gather the states; Lightning calls this on every rank."""
        checkpoint["random_states"] = ranks.all_gather_object(_states())

    def on_load_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep them until the fit starts."""
        self._restored = checkpoint.get("random_states", [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Give them back before the loader's first order is drawn."""
        states, self._restored = self._restored, []
        if len(states) == trainer.world_size:
            _restore(states[trainer.global_rank])


class MetricsSoFar(Callback):
    """Keeps the metrics logged so far in the checkpoint, for a job that is stopped between its last one and its result.

    :func:`metrics_so_far` reads them.
    """

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Add them."""
        checkpoint["metrics_so_far"] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: what has its name is whole, also after SIGKILL.

    Lightning's own writes to the temporary directory, from which another file system copies.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save, whole or not at all.

        Args:
            checkpoint: see Lightning's ``CheckpointIO``.
            path: a local file; anything else is saved as Lightning does.
            storage_options: not supported, as in Lightning's ``TorchCheckpointIO``.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).chmod(0o644)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint to go on from in a run directory; None where there is none."""
    path = Path(run_dir) / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def metrics_so_far(checkpoint: Path) -> dict[str, float]:
    """What had been logged when a checkpoint of this job was saved, by :class:`MetricsSoFar`."""
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


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a dict, by its name on the command line."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


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


def _of_the_job(cfg: DictConfig) -> Any:
    """The config without what says where and how often it runs, as JSON would give it back."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    run_dir = str(values["run_dir"])
    kept = {key: value for key, value in values.items() if key not in _NOT_OF_THE_JOB}
    return json.loads(json.dumps(kept, sort_keys=True).replace(json.dumps(run_dir)[1:-1], "RUN_DIR"))


def _states() -> dict[str, Any]:
    """Of Python's, NumPy's and torch's generators, in tensors, numbers and strings."""
    version, words, gauss = random.getstate()
    state = numpy.random.get_state(legacy=False)
    assert isinstance(state, dict)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype("int64"))
    return {
        "python": [version, list(words), gauss],
        "numpy": state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    state = states["numpy"]
    key = state["state"]["key"].numpy().astype("uint32")
    numpy.random.set_state({**state, "state": {**state["state"], "key": key}})
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
