"""What adapting the running statistics to shifted data does to the error: one model, tested before and after."""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from bnkit.callbacks import BatchNormAdaptation, BatchNormRecalibration
from bnkit.training.corruptions import CORRUPTIONS, SEVERITIES
from bnkit.training.images import ImageData, ImageDataset

log = logging.getLogger(__name__)

Cell = tuple[str, str, str]
"""Table, row and column of a measurement."""


def run_adaptation(cfg: DictConfig) -> str:
    """Train a model for each shift and seed, test it before and after adaptation, and compare.

    The errors of a model are written to ``<folder>/<shift>/<seed>.json`` once all of them are there, so a run that was
    stopped goes on where it was.

    Args:
        cfg: ``conf/adapt.yaml``, composed.

    Returns:
        The tables, in Markdown; they are also written to ``<folder>/tables.md``.

    Raises:
        ValueError: For ``only`` with a name that is not among the shifts.
        ModuleNotFoundError: When a shift needs mlxtend and it is not installed.
    """
    unknown = sorted(set(cfg.only or ()) - set(cfg.shifts))
    if unknown:
        raise ValueError(f"only={unknown} names no shifts: there are {list(cfg.shifts)}.")
    folder = Path(cfg.folder)
    chosen = [name for name in cfg.shifts if name in (cfg.only or cfg.shifts)]
    with _quiet(), _threads(cfg.threads):
        for seed in cfg.seeds:
            for name in chosen:
                path = folder / name / f"{seed}.json"
                if not path.exists():
                    log.info("%s, seed %d ...", name, seed)
                    _write(path, _Job(cfg, cfg.shifts[name], seed).errors())
    paths = [folder / name / f"{seed}.json" for name in chosen for seed in cfg.seeds]
    text = tables([json.loads(path.read_text()) for path in paths])
    (folder / "tables.md").write_text(text + "\n")
    print(f"\n{text}")
    return text


def tables(results: list[list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds of the errors in percent, one Markdown table for each ``table``.

    Args:
        results: of each model its measurements, with the keys ``table``, ``row``, ``column`` and ``error`` (a
            fraction). Several of one model in one cell are averaged first.
    """
    of_models: dict[Cell, list[float]] = {}
    for result in results:
        cells: dict[Cell, list[float]] = {}
        for one in result:
            cells.setdefault((one["table"], one["row"], one["column"]), []).append(one["error"])
        for cell, errors in cells.items():
            of_models.setdefault(cell, []).append(100 * statistics.mean(errors))
    lines = []
    for table in dict.fromkeys(table for table, _, _ in of_models):
        rows = dict.fromkeys(row for found, row, _ in of_models if found == table)
        columns = dict.fromkeys(column for found, _, column in of_models if found == table)
        lines += ["", f"| {table} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells_of_row = [of_models.get((table, row, column), []) for column in columns]
            lines.append(f"| {row} | " + " | ".join(map(_mean_and_spread, cells_of_row)) + " |")
    return "\n".join(lines[1:])


class _Job:
    """One model, trained on the source, and its errors on the shifted data."""

    def __init__(self, cfg: DictConfig, shift: DictConfig, seed: int) -> None:
        self.cfg = cfg
        self.shift = shift
        self.found: list[dict[str, Any]] = []
        self.source: ImageData = instantiate(shift.source)
        self.source.prepare_data()
        self.seed = seed
        self.module = self._trained()

    def errors(self) -> list[dict[str, Any]]:
        """All measurements that the shift's config asks for."""
        clean = self.source.split("test")
        size = self.cfg.test_size
        images, labels = self._pixels(clean.images[:size]), clean.labels[:size]
        if "targets" in self.shift:
            self._other_sources(images, labels)
        if self.shift.get("corrupted"):
            self._corruptions(images, labels)
            self._samples(images, labels)
            self._consistency(images, labels)
            self._classes(images, labels)
        return self.found

    def _trained(self) -> LightningModule:
        seed_everything(self.seed, workers=True, verbose=False)
        model = OmegaConf.to_container(self.cfg.model, resolve=True)
        assert isinstance(model, dict)
        # Down to nothing at the end of training, however long that is for this source.
        annealing = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True}
        model["scheduler"] = {**annealing, "T_max": self.shift.epochs}
        module: LightningModule = instantiate(model, _convert_="all")
        # The source statistics are exact: what adaptation gains is not what the moving average had lost.
        trainer = _trainer([BatchNormRecalibration(every_n_epochs=0, max_samples=None)], max_epochs=self.shift.epochs)
        trainer.fit(module, self.source.train_dataloader())
        return module

    def _pixels(self, normalised: Tensor) -> Tensor:
        """Images as fractions of white."""
        return (normalised * self.source.std + self.source.mean).clamp(0, 1)

    def _measure(self, cell: Cell, images: Tensor, labels: Tensor, batch_size: int = 256, **options: Any) -> None:
        """Test as a user does, with the callback where there are options for it."""
        # Normalised as the model was trained: of the target nothing is known.
        dataset = ImageDataset((images - self.source.mean) / self.source.std, labels)
        callbacks = [BatchNormAdaptation(**options)] if options else []
        loader = DataLoader(dataset, batch_size, collate_fn=_as_fetched)
        [result] = _trainer(callbacks).test(self.module, loader, verbose=False)
        table, row, column = cell
        error = 1 - float(result["test/accuracy"])
        self.found.append({"table": table, "row": row, "column": column, "error": error})

    def _before_and_after(self, table: str, row: str, images: Tensor, labels: Tensor) -> None:
        self._measure((table, row, "before"), images, labels)
        self._measure((table, row, "adapted"), images, labels, **self._options())

    def _options(self, **changed: Any) -> dict[str, Any]:
        return {**self.cfg.adaptation, **changed}

    def _other_sources(self, images: Tensor, labels: Tensor) -> None:
        table = "trained on, tested on"
        self._before_and_after(table, f"{self.shift.name}, its own test images", images, labels)
        for target in self.shift.targets:
            (pixels, classes), _ = instantiate(target.data).read()
            self._before_and_after(table, f"{self.shift.name}, {target.name}", pixels, classes)

    def _corruptions(self, images: Tensor, labels: Tensor) -> None:
        table = "error in %, by severity"
        self._measure((table, "clean", "1"), images, labels)
        self._measure((table, "clean, adapted", "1"), images, labels, **self._options())
        for name, corrupt in CORRUPTIONS.items():
            for severity in SEVERITIES:
                corrupted = corrupt(images, severity)
                self._measure((table, name, str(severity)), corrupted, labels)
                self._measure((table, f"{name}, adapted", str(severity)), corrupted, labels, **self._options())

    def _shifted(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "clean", images
        for name, corrupt in CORRUPTIONS.items():
            yield name, corrupt(images, self.cfg.severity)

    def _samples(self, images: Tensor, labels: Tensor) -> None:
        table = f"severity {self.cfg.severity}, target samples"
        for name, shifted in self._shifted(images):
            for samples in (*self.cfg.samples, len(labels)):
                row, size = f"{name}, {samples}", min(samples, 256)
                self._measure((table, row, "before"), shifted, labels)
                for prior in self.cfg.prior_samples:
                    options = self._options(max_samples=samples, prior_samples=prior)
                    self._measure((table, row, f"prior_samples={prior}"), shifted, labels, size, **options)

    def _consistency(self, images: Tensor, labels: Tensor) -> None:
        table = f"severity {self.cfg.severity}, batches of"
        for name, shifted in self._shifted(images):
            for size, prior in ((1, 0), (256, 0), (256, 256)):
                for consistency in ("batch", "population"):
                    column = f"{size}, prior_samples={prior}, {consistency}"
                    options = self._options(prior_samples=prior, consistency=consistency)
                    options["max_samples"] = 256 if size == 1 else options["max_samples"]  # many small forwards
                    self._measure((table, name, column), shifted, labels, size, **options)

    def _classes(self, images: Tensor, labels: Tensor) -> None:
        table = f"severity {self.cfg.severity}, classes in the target"
        total = self.source.num_classes
        for name, shifted in list(self._shifted(images))[:2]:  # clean and noise, to keep the run short
            for number in self.cfg.classes:
                for start in range(0, total, 2) if number < total else (0,):
                    of = torch.isin((labels - start) % total, torch.arange(number))
                    row, target = f"{name}, {number}", (shifted[of], labels[of])
                    self._measure((table, row, "before"), *target)
                    for prior in (self.cfg.prior_samples[0], self.cfg.prior_samples[-1]):
                        options = self._options(prior_samples=prior)
                        self._measure((table, row, f"prior_samples={prior}"), *target, **options)


def _as_fetched(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch


def _trainer(callbacks: list[Any], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _write(path: Path, result: list[dict[str, Any]]) -> None:
    """All or nothing: a result that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(result, file, indent=1)
    os.replace(file.name, path)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of loaders, loggers and devices at each of some hundred tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
        yield
