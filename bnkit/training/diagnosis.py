"""Diagnose a checkpoint, or any model that a config can build."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_map

from bnkit.callbacks.swap_state import swap_as_saved
from bnkit.diagnosis import SEVERITIES, Finding, diagnose, table
from bnkit.feeding import known_samples_in
from bnkit.layers import batch_norm_layers
from bnkit.training.checkpoint import fill, find_config, load_checkpoint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["diagnose_config"]

log = logging.getLogger(__name__)


def diagnose_config(cfg: DictConfig) -> list[Finding]:
    """Diagnose the model of a checkpoint, or a fresh one, and log the findings.

    A checkpoint's model is looked at in evaluation mode, with the layers that it was trained with; a fresh one as it is
    built. Where there are data, a training batch goes through it.

    Args:
        cfg: ``conf/diagnose.yaml``, composed.

    Returns:
        The findings.

    Raises:
        FileNotFoundError: When the checkpoint, the config of its run, or the folder of the output is not there.
        SystemExit: With exit code 1, where ``cfg.fail_on`` says so.
        ValueError: When there is no model, the file is no checkpoint of tensors and plain values, its weights do not
            fit, or a value is out of its range.
    """
    if cfg.fail_on is not None and cfg.fail_on not in SEVERITIES:
        raise ValueError(f"fail_on={cfg.fail_on} is not a severity; it is error, warning, info or null.")
    if cfg.output is not None and not Path(cfg.output).resolve().parent.is_dir():
        raise FileNotFoundError(f"output={cfg.output} is in a folder that does not exist; make it first.")
    seed_everything(cfg.seed, workers=True, verbose=False)
    model, data = _model_and_data(cfg)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    findings = diagnose(
        model,
        batch_size=cfg.batch_size if cfg.batch_size is not None else (data or {}).get("batch_size"),
        world_size=cfg.world_size,
        accumulate=cfg.accumulate,
        sample=_sample(data, cfg.sample) if cfg.sample > 0 and data is not None else None,
        ignore=list(cfg.ignore),
    )
    log.info("%s, %d BatchNorm layers\n%s", type(model).__name__, len(batch_norm_layers(model)), table(findings))
    if cfg.output is not None:
        text = json.dumps([finding.to_dict() for finding in findings], indent=2)
        Path(cfg.output).write_text(text + "\n", encoding="utf-8")
        log.info("Findings: %s", cfg.output)
    if cfg.fail_on is not None and any(
        SEVERITIES.index(finding.severity) <= SEVERITIES.index(cfg.fail_on) for finding in findings
    ):
        raise SystemExit(1)
    return findings


def _model_and_data(cfg: DictConfig) -> tuple[nn.Module, Any]:
    """The model, and the config of the data; None where there are none."""
    given, data = cfg.model._target_ is not None, cfg.data if cfg.data._target_ is not None else None
    if cfg.ckpt is None:
        if not given:
            raise ValueError(
                "There is no model to diagnose: give ckpt=RUN_DIR/checkpoints/last.ckpt, model=resnet, or "
                "model._target_=my_project.Net."
            )
        return _built(cfg.model), data
    path = Path(cfg.ckpt)
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt={path} does not exist; give the path of a checkpoint, e.g. RUN_DIR/checkpoints/last.ckpt."
        )
    checkpoint = load_checkpoint(path)
    if given:
        model = _built(cfg.model)
    else:
        trained = OmegaConf.load(find_config(path, cfg.config))
        model = _built(trained.model)
        data = trained.data if data is None else data
    swap_as_saved(model, checkpoint)
    fill(model, checkpoint["state_dict"], path)
    return model.eval(), data


def _built(config: Any) -> nn.Module:
    model = instantiate(config, _convert_="all")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model._target_={config._target_} gives a {type(model).__name__}, which is no torch module.")
    return model


def _sample(data: Any, samples: int) -> Any:
    """The first training batches of a data module, as one of so many samples or a few more, if there are as many."""
    datamodule: Any = instantiate(data)
    datamodule.prepare_data()
    datamodule.setup("fit")
    batches: list[Any] = []
    seen = 0
    for batch in datamodule.train_dataloader():
        batches.append(batch)
        seen += known_samples_in(batch) or samples
        if seen >= samples:
            break
    if not batches:
        raise ValueError(f"{type(datamodule).__name__} has no training batch to run the model on: set sample=0.")
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0], *batches)
