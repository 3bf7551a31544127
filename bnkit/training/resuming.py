"""What a checkpoint needs beside Lightning's own for a stopped job to go on as if it had not been stopped."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bnkit import ranks

__all__ = ["AtomicCheckpointIO", "MetricsSoFar", "RandomStates", "SigtermEndsTheFit"]


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

    ``bnkit.training.run_directory.metrics_so_far`` reads them.
    """

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Add them."""
        checkpoint["metrics_so_far"] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class SigtermEndsTheFit(Callback):
    """Lets SIGTERM end a fit of several processes at once, in each of them.

    Lightning's own handler tells the other ranks by a collective, which comes between those of the step: the ranks then
    wait for each other for ever. Here the process tells those that it has started by the same signal, and leaves.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Replace Lightning's handler, which Lightning replaces by the one of before when the fit ends."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return

        def end(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.Signals(signum))
            raise SIGTERMException

        signal.signal(signal.SIGTERM, end)


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
