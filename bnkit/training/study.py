"""The study: one job for each method, batch size and seed, and a table of what came out."""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig

from bnkit.training.job import run

log = logging.getLogger(__name__)

RUNNING, RECALIBRATED = "val/accuracy_running_average", "val/accuracy"


def run_study(cfg: DictConfig) -> str:
    """Run the jobs that have no result yet, then compare all results there are.

    A job's metrics are written to ``<folder>/<method>/<batch size>/<seed>/metrics.json`` once it has ended, so a study
    that was stopped goes on where it was, and several processes can share one, say by ``seeds=[0]`` and ``seeds=[1]``.

    Args:
        cfg: ``conf/study.yaml``, composed.

    Returns:
        The table, in Markdown; it is also written to ``<folder>/table.md``.

    Raises:
        ValueError: for ``only`` with a name that is not among the methods.
    """
    unknown = sorted(set(cfg.only or ()) - set(cfg.methods))
    if unknown:
        raise ValueError(f"only={unknown} names no methods of the study: it has {list(cfg.methods)}.")
    folder = Path(cfg.folder)
    for seed in cfg.seeds:
        for batch_size in cfg.batch_sizes:
            for method in cfg.only or cfg.methods:
                _job(cfg, folder, method, batch_size, seed)
    text = table(folder, list(cfg.methods), list(cfg.batch_sizes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    return text


def table(folder: Path, methods: list[str], batch_sizes: list[int]) -> str:
    """Mean and standard deviation over the seeds, in percent, of all results in a folder; a Markdown table.

    Two numbers a cell: by the statistics that training left, and recalibrated. One where these cannot differ.
    """
    lines = [
        "| method | " + " | ".join(f"batch {size}: running average | recalibrated" for size in batch_sizes) + " |",
        "|---|" + "---|---|" * len(batch_sizes),
    ]
    for method in methods:
        cells = [method]
        for size in batch_sizes:
            results = [
                json.loads(path.read_text())
                for path in sorted(folder.glob(f"{method.replace(' ', '_')}/{size}/*/metrics.json"))
            ]
            recalibrated = [result[RECALIBRATED] for result in results]
            running = [result.get(RUNNING) for result in results]
            both = bool(running) and None not in running
            cells += [_cell(running) if both else _cell(recalibrated), _cell(recalibrated) if both else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _folder_name(method: str) -> str:
    return method.replace(" ", "_")


def _cell(values: list[Any]) -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _job(cfg: DictConfig, folder: Path, method: str, batch_size: int, seed: int) -> None:
    where = folder / _folder_name(method) / str(batch_size) / str(seed)
    if (where / "metrics.json").exists():
        return
    overrides = [
        *cfg.common,
        *(override.replace("HALF", str(max(1, batch_size // 2))) for override in cfg.methods[method]),
        f"data.batch_size={batch_size}",
        f"seed={seed}",
        f"run_dir={where}",
    ]
    job = compose(cfg.job, overrides=overrides)
    devices = job.trainer.devices
    # In proportion to the batch that an optimizer step sees (Goyal et al. 2017).
    job.model.optimizer.lr = cfg.learning_rate * batch_size * devices
    metrics = run(job)
    log.info(
        "%s, batch %d, seed %d: %.1f %%, recalibrated %.1f %%",
        method,
        batch_size,
        seed,
        100 * metrics.get(RUNNING, metrics[RECALIBRATED]),
        100 * metrics[RECALIBRATED],
    )
    _write(where / "metrics.json", metrics)


def _write(path: Path, metrics: dict[str, float]) -> None:
    """All or nothing: a result that is there is whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(metrics, file, indent=1)
    os.replace(file.name, path)
