"""Recalibrate a checkpoint of the reference job."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

import bnkit
from bnkit.callbacks.swap_state import swap_as_saved
from bnkit.training.job import CONFIG_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from bnkit.training.images import Batch, ImageData

log = logging.getLogger(__name__)


def recalibrate_checkpoint(cfg: DictConfig) -> Path:
    """Recalibrate the running statistics in a checkpoint, on the training split of ``cfg.data`` or of the run's data.

    The new checkpoint differs from the old one in nothing but the running statistics. It is written aside and moved
    into place whole; the old one is left as it is. Logged are the drift of each layer, and the validation accuracy
    before and after.

    Args:
        cfg: ``conf/recalibrate.yaml``, composed.

    Returns:
        The path of the new checkpoint.

    Raises:
        FileNotFoundError: When the checkpoint, or the config of its run, is not there.
        ValueError: When the file is no checkpoint of tensors and plain values, its weights do not fit the config's
            model, or the new checkpoint would replace the old one.
    """
    path = Path(cfg.ckpt)
    output = Path(cfg.output) if cfg.output is not None else path.with_name(f"{path.stem}-recalibrated{path.suffix}")
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt={path} does not exist; give the path of a checkpoint, e.g. RUN_DIR/checkpoints/last.ckpt."
        )
    if output.resolve() == path.resolve():
        raise ValueError(f"output={output} is the checkpoint itself, which is never overwritten; name another file.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={output} is in a folder that does not exist; make it first.")
    checkpoint = load_checkpoint(path)
    trained = OmegaConf.load(find_config(path, cfg.config))
    seed_everything(cfg.seed, workers=True, verbose=False)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = cfg.get("data") or trained.data
    if cfg.batch_size is not None:
        data = OmegaConf.merge(data, {"batch_size": cfg.batch_size})
    datamodule: ImageData = instantiate(data)
    datamodule.prepare_data()
    datamodule.setup()
    module: nn.Module = instantiate(trained.model, _convert_="all")
    swap_as_saved(module, checkpoint)
    fill(module, checkpoint["state_dict"], path)
    module.to(device).eval()

    before = _accuracy(module, datamodule.val_dataloader(), device)
    report = bnkit.recalibrate(
        module,
        datamodule.train_dataloader(),
        forward=lambda model, batch: model(batch[0].to(device)),
        **OmegaConf.to_container(cfg.recalibration, resolve=True),  # type: ignore[arg-type]
    )
    after = _accuracy(module, datamodule.val_dataloader(), device)
    for name, value in module.state_dict().items():
        checkpoint["state_dict"][name].copy_(value)
    _save_atomically(checkpoint, output)
    log.info("%s\n", report.table())
    log.info("Validation accuracy: %.1f %% before, %.1f %% after", 100 * before, 100 * after)
    log.info("Recalibrated checkpoint: %s", output)
    return output


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load tensors and plain values; a file that wants to run code is refused."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint that loads with weights_only=True: it is damaged, of another kind, or holds "
            f"objects, which could run code when loaded ({type(error).__name__})."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} has no state_dict; give a checkpoint that Lightning saved.")
    return checkpoint


def find_config(path: Path, given: str | None) -> Path:
    """Return the resolved config of the run that saved the checkpoint ``path``."""
    folder = path.resolve().parent
    candidates = [Path(given)] if given is not None else [folder / CONFIG_NAME, folder.parent / CONFIG_NAME]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"The config to build the model from is not there ({' or '.join(map(str, candidates))}); "
        f"set config= to the {CONFIG_NAME} of the run that saved {path}."
    )


def fill(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a checkpoint's weights into the network, or say which of them do not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n\t")[1].split()) if "\n\t" in str(error) else str(error)
        raise ValueError(
            f"The weights in {path} do not fit the model of its config (for one: {problem[:200]}); "
            f"set config= to the {CONFIG_NAME} of the run that saved it."
        ) from error


@torch.no_grad()
def _accuracy(module: nn.Module, batches: Iterable[Batch], device: str) -> float:
    """Return the fraction of images that ``module``, in evaluation mode, classifies right."""
    right = total = 0
    for images, labels in batches:
        right += int((module(images.to(device)).argmax(dim=1).cpu() == labels).sum())
        total += len(labels)
    return right / total


def _save_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint`` whole or not at all."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp keeps the file to its owner; a checkpoint is as readable as any new file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
