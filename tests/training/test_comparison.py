from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

import bnkit
from bnkit.callbacks import BatchNormRecalibration
from bnkit.training import Comparison, Digits, ImageClassifier, ResNet, StatisticsComparison

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "max_epochs": 2,
    "limit_train_batches": 8,
}


def fit(*callbacks: Callback, **options) -> tuple[ImageClassifier, Trainer]:
    seed_everything(0, workers=True, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    module = ImageClassifier(ResNet(width=4, depths=[1, 1]), num_classes=10, optimizer=optimizer)
    trainer = Trainer(callbacks=list(callbacks), **{**QUIET, **options})
    trainer.fit(module, datamodule=Digits(batch_size=16, eval_batch_size=100))
    return module, trainer


class Recompute(Callback):
    """Computes both accuracies of each validation from scratch, from copies of the statistics."""

    def __init__(self, recalibration: BatchNormRecalibration) -> None:
        self.recalibration = recalibration
        self.rows: list[tuple[float, float]] = []

    @torch.no_grad()
    def on_train_epoch_start(self, trainer, pl_module):
        # after the validation of the epoch before: the weights are those that it validated
        if self.recalibration.report is not None:
            self.compute(trainer, pl_module)

    @torch.no_grad()
    def compute(self, trainer, pl_module):
        data = trainer.datamodule.split("validation")
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.eval()

        def accuracy() -> float:
            return float((pl_module(data.images).argmax(1) == data.labels).float().mean())

        after = accuracy()
        for name, (mean, variance) in self.recalibration.report.before.items():
            layer = pl_module.get_submodule(name)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        before = accuracy()
        pl_module.load_state_dict(state)
        pl_module.train()
        self.rows.append((before, after))


def test_the_rows_equal_an_independent_computation():
    recalibration = BatchNormRecalibration(at_fit_end=False)
    comparison, recompute = StatisticsComparison(num_classes=10), Recompute(recalibration)
    module, trainer = fit(comparison, recompute, recalibration, max_epochs=3)
    recompute.compute(trainer, module)
    assert [row.epoch for row in comparison.rows] == [0, 1, 2]
    assert [(row.running_average, row.recalibrated) for row in comparison.rows] == [
        pytest.approx(row) for row in recompute.rows
    ]
    assert any(row.running_average != row.recalibrated for row in comparison.rows)


@pytest.mark.parametrize("comparison_first", [True, False])
def test_training_is_not_disturbed_by_a_single_bit(comparison_first):
    comparison = StatisticsComparison(num_classes=10)
    callbacks = [BatchNormRecalibration()]
    callbacks.insert(0 if comparison_first else 1, comparison)
    module, trainer = fit(*callbacks)
    random_state = torch.get_rng_state()
    plain, plain_trainer = fit(BatchNormRecalibration())
    assert torch.equal(random_state, torch.get_rng_state())
    assert len(comparison.rows) == 2
    for (name, value), other in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert trainer.callback_metrics["val/accuracy"] == plain_trainer.callback_metrics["val/accuracy"]


def test_both_accuracies_are_logged_side_by_side():
    comparison = StatisticsComparison(num_classes=10)
    _, trainer = fit(comparison, BatchNormRecalibration())
    metrics = trainer.callback_metrics
    row = comparison.rows[-1]
    assert float(metrics["val/accuracy_running_average"]) == row.running_average
    assert float(metrics["val/accuracy"]) == row.recalibrated
    assert all(name.count("/") == 1 for name in metrics)


def test_a_validation_without_recalibration_has_no_row():
    comparison = StatisticsComparison(num_classes=10)
    module, trainer = fit(comparison, BatchNormRecalibration(every_n_epochs=2), max_epochs=4, num_sanity_val_steps=2)
    assert [row.epoch for row in comparison.rows] == [1, 3]
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert len(comparison.rows) == 2


def test_without_recalibration_it_says_so_and_does_nothing(capfd, caplog):
    comparison = StatisticsComparison(num_classes=10)
    with caplog.at_level("INFO"):
        _, trainer = fit(comparison)
    said = capfd.readouterr()
    assert (caplog.text + said.err).count("the trainer has no BatchNormRecalibration callback") == 1
    assert comparison.rows == []
    assert "val/accuracy_running_average" not in trainer.callback_metrics
    assert "running average" not in said.out


def test_the_table_is_printed_once_and_aligned(capsys):
    comparison = StatisticsComparison(num_classes=10)
    fit(comparison, BatchNormRecalibration())
    printed = capsys.readouterr().out
    assert printed.count(comparison.table()) == 1
    assert printed.count("by the running average") == 2  # a line after each validation


def test_the_table_shows_percent_percentage_points_and_the_mean():
    comparison = StatisticsComparison(num_classes=10)
    comparison.rows = [Comparison(0, 0.5, 0.75), Comparison(11, 0.9, 0.8)]
    lines = comparison.table().splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0", "50.0", "75.0", "+25.0"],
        ["11", "90.0", "80.0", "-10.0"],
        ["mean", "70.0", "77.5", "+7.5"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_rows_are_in_the_checkpoint():
    one, other = StatisticsComparison(num_classes=10), StatisticsComparison(num_classes=10)
    one.rows = [Comparison(0, 0.5, 0.75)]
    other.load_state_dict(one.state_dict())
    assert other.rows == one.rows
    assert type(one.state_dict()["rows"][0]) is tuple  # loads with weights_only=True


@pytest.mark.ddp
def test_every_image_counts_once_over_two_ranks(tmp_path):
    comparison = StatisticsComparison(num_classes=10)
    recalibration = BatchNormRecalibration(at_fit_end=False)
    saver = SaveReport(recalibration, tmp_path / "report.pt")
    _, trainer = fit(comparison, saver, recalibration, strategy="ddp_fork", devices=2, max_epochs=1)
    saved = torch.load(tmp_path / "report.pt", weights_only=True)
    module = ImageClassifier(ResNet(width=4, depths=[1, 1]), num_classes=10, optimizer=torch.optim.SGD)
    module.load_state_dict(saved["state"])
    module.eval()
    data = Digits(batch_size=16).split("validation")
    with torch.no_grad():
        after = (module(data.images).argmax(1) == data.labels).float().mean()
        with bnkit.running_statistics(module, saved["before"]):
            before = (module(data.images).argmax(1) == data.labels).float().mean()
    assert float(trainer.callback_metrics["val/accuracy_running_average"]) == pytest.approx(float(before), abs=1e-6)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(float(after), abs=1e-6)


class SaveReport(Callback):
    """Brings rank 0's model and replaced statistics back from the process that it ran in."""

    def __init__(self, recalibration: BatchNormRecalibration, path) -> None:
        self.recalibration = recalibration
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero and not trainer.sanity_checking:
            torch.save({"state": pl_module.state_dict(), "before": dict(self.recalibration.report.before)}, self.path)
