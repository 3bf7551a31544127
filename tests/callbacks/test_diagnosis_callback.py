"""BatchNormDiagnosis: what it learns from the trainer, and that training does not notice it."""

import re

import pytest
import torch
from helpers.lightning_models import Classifier, Images, loader, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnkit.callbacks import BatchNormDiagnosis, BatchNormRecalibration, BatchNormSwap
from bnkit.norms import Frozen, Group, Renorm, Sync

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


class Augmented(Images):
    """Draws from torch's global generator for each sample."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


def fit(folder, callbacks=(), model=None, train=None, **options):
    seed_everything(7, verbose=False)  # before the model is made
    model = Classifier() if model is None else model if isinstance(model, nn.Module) else model()
    engine = trainer(folder, callbacks, **({"max_epochs": 1} | options))
    engine.fit(model, loader() if train is None else train, loader(shuffle=False))
    return model


def codes(callback):
    return [finding.code for finding in callback.findings]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_bit_identical_to_that_without(tmp_path, workers, options):
    runs = []
    for callbacks in ([], [BatchNormDiagnosis()]):
        train = DataLoader(
            Augmented(), 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )  # fmt: skip
        model = fit(tmp_path, callbacks, lambda: Classifier(dropout=0.3), train, max_epochs=2, **options)
        runs.append((model.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (ours, ours_rng) = runs
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert torch.equal(plain_rng, ours_rng)


def test_it_learns_the_batch_the_accumulation_and_the_optimizer_from_the_trainer(tmp_path, capsys):
    class Decaying(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.bn1.parameters(), lr=0.1, weight_decay=0.1)

    callback = BatchNormDiagnosis()
    fit(tmp_path, [callback], Decaying(dropout=0.5), accumulate_grad_batches=2)
    assert codes(callback) == ["BN101", "BN301", "BN402", "BN103", "BN302", "BN401"]
    by_code = {finding.code: finding for finding in callback.findings}
    assert "4 samples are normalised together" in by_code["BN101"].message
    assert "as the sample tells" in by_code["BN101"].message
    assert "times the variance" in by_code["BN301"].message
    assert by_code["BN402"].layers == ("net.bn2",)
    assert by_code["BN401"].layers == ("net.bn1",)
    printed = capsys.readouterr().out
    assert printed.count("Diagnosis of Decaying, 2 BatchNorm layers") == 1
    assert all(printed.count(f"\n{code}  ") == 1 for code in by_code)


def test_a_last_batch_of_one_is_found_before_it_stops_the_training(tmp_path):
    class Rows(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def rows(**options):
        return DataLoader(TensorDataset(torch.randn(33, 4), torch.arange(33) % 3), 16, **options)

    callback = BatchNormDiagnosis(fail_on="error")
    with pytest.raises(MisconfigurationException, match=r"BN102.*last batch of an epoch has 1 sample"):
        fit(tmp_path, [callback], Rows(), rows(), num_sanity_val_steps=0)
    for options, limits in (({"drop_last": True}, {}), ({}, {"limit_train_batches": 2})):
        fit(tmp_path, [callback], Rows(), rows(**options), num_sanity_val_steps=0, limit_val_batches=0, **limits)
        assert codes(callback) == []


@pytest.mark.parametrize("swap_first", [True, False])
def test_it_looks_at_the_layers_that_training_will_have(tmp_path, swap_first):
    for swap in (BatchNormSwap(Group(2)), BatchNormSwap(Renorm())):
        callback = BatchNormDiagnosis()
        fit(tmp_path, [swap, callback] if swap_first else [callback, swap])
        assert "BN101" not in codes(callback)
    callback = BatchNormDiagnosis()
    fit(tmp_path, [BatchNormSwap(Frozen()), callback])
    assert codes(callback) == ["BN203"], "frozen before it has learnt anything"


def test_averaged_weights_are_told_unless_they_are_recalibrated(tmp_path):
    callback = BatchNormDiagnosis(ignore=["BN101", "BN302"])
    fit(tmp_path, [callback, EMAWeightAveraging()])
    assert codes(callback) == ["BN404"]
    fit(tmp_path, [callback, EMAWeightAveraging(use_buffers=False)])
    assert codes(callback) == ["BN403"]
    fit(tmp_path, [callback, EMAWeightAveraging(), BatchNormRecalibration()])
    assert codes(callback) == []


@pytest.mark.parametrize(("fail_on", "stops"), [("error", False), ("warning", True), ("info", True), (None, False)])
def test_fail_on_stops_before_the_first_step(tmp_path, fail_on, stops):
    callback, model = BatchNormDiagnosis(fail_on=fail_on), Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if stops:
        with pytest.raises(MisconfigurationException, match=re.escape(f"fail_on={fail_on!r}") + ".*BN101.*ignore="):
            fit(tmp_path, [callback], model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        fit(tmp_path, [callback], model)
    assert codes(callback) == ["BN101", "BN302"]


@pytest.mark.parametrize("options", [{"fail_on": "always"}, {"ignore": ["BN999"]}])
def test_what_cannot_be_is_refused_when_it_is_made(options):
    with pytest.raises(ValueError, match=r"always|BN999"):
        BatchNormDiagnosis(**options)


def test_sharded_parameters_are_refused():
    engine = type("Trainer", (), {"strategy": FSDPStrategy(), "callbacks": []})()
    with pytest.raises(MisconfigurationException, match="BatchNormDiagnosis cannot read"):
        BatchNormDiagnosis().setup(engine, Classifier(), "fit")


# --- where nothing can be measured, training goes on, and the rest is told


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(2, 8, 8) + number % 3, 0) for number in range(48)])


class Dictionaries(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["pixels"]), batch["label"])


class Pairs(Images):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"pixels": x, "label": y}


def test_an_iterable_data_set_is_measured(tmp_path, capsys):
    callback = BatchNormDiagnosis()
    fit(tmp_path, [callback], train=DataLoader(Stream(), 4))
    assert "as the sample tells" in callback.findings[0].message
    assert "Not measured" not in capsys.readouterr().out


def test_data_that_is_no_loader_is_not_read(tmp_path, capsys):
    callback, batches = BatchNormDiagnosis(), [(torch.randn(4, 2, 8, 8), torch.zeros(4).long())] * 3
    fit(tmp_path, [callback], train=iter(batches))
    assert codes(callback) == ["BN302"], "the size of the batches is unknown"
    assert "Not measured: a batch of the training data (list_iterator)" in capsys.readouterr().out


def test_a_module_that_cannot_be_run_by_itself_is_still_diagnosed(tmp_path, capsys):
    train, callback = DataLoader(Pairs(), 4), BatchNormDiagnosis()
    fit(tmp_path, [callback], Dictionaries(), train)
    assert codes(callback) == ["BN101", "BN302"]
    assert "up to 1/sqrt(4) = 0.5" in callback.findings[0].message
    assert "Not measured:" in capsys.readouterr().out
    callback = BatchNormDiagnosis(forward=lambda model, batch: model(batch["pixels"]))
    fit(tmp_path, [callback], Dictionaries(), train)
    assert "as the sample tells" in callback.findings[0].message


def test_without_a_sample_nothing_is_read(tmp_path):
    class Untouchable(Images):
        reads = 0

        def __getitem__(self, index):
            Untouchable.reads += 1
            return super().__getitem__(index)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.reads = getattr(self, "reads", Untouchable.reads)

    reads = []
    for callbacks in ([], [BatchNormDiagnosis(sample=False)], [BatchNormDiagnosis()]):
        Untouchable.reads, watch = 0, Watch()
        fit(tmp_path, [*callbacks, watch], train=DataLoader(Untouchable(), 4))
        reads.append(watch.reads)
    assert reads[0] == reads[1]
    assert reads[2] == reads[0] + 4


# --- several ranks


@pytest.mark.ddp
@pytest.mark.parametrize("fail_on", [None, "warning"])
def test_all_ranks_decide_alike_and_one_prints(tmp_path, fail_on, capfd):
    class Noted(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (tmp_path / f"stepped_{trainer.global_rank}").touch()

    options = {"devices": 2, "strategy": "ddp_fork", "num_sanity_val_steps": 0}
    callback = BatchNormDiagnosis(fail_on=fail_on)
    if fail_on is None:
        fit(tmp_path, [callback, Noted()], **options)
    else:
        with pytest.raises(Exception, match=r"BN104|terminated|raised"):
            fit(tmp_path, [callback, Noted()], **options)
    assert len(list(tmp_path.glob("stepped_*"))) == (2 if fail_on is None else 0)
    printed = capfd.readouterr().out
    assert printed.count("Diagnosis of Classifier") == 1
    assert "Each of the 2 ranks normalises its 4 by itself" in printed


class OneRankFails(Classifier):
    """Its sample fails on one rank, before a layer in which the other waits."""

    def forward(self, x):
        if self.trainer.global_rank == 1 and not torch.is_grad_enabled():
            raise RuntimeError("not on this rank")
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.ddp
def test_where_layers_wait_for_ranks_a_sample_that_fails_on_one_is_run_on_none(tmp_path, capfd):
    fit(tmp_path, [BatchNormSwap(Sync()), BatchNormDiagnosis()], OneRankFails, devices=2, strategy="ddp_fork")
    assert "Not measured: not on this rank." in capfd.readouterr().out


# --- LightningCLI


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_a_lightning_cli_builds_it_from_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  logger: false\n"
        "  accelerator: cpu\n"
        "  callbacks:\n"
        "    - class_path: bnkit.callbacks.BatchNormDiagnosis\n"
        "      init_args:\n"
        "        fail_on: error\n"
        "        ignore: [BN401, BN302]\n"
        "        sample: false\n"
    )
    cli = LightningCLI(
        Classifier,
        Data,
        run=False,
        args=["--config", str(config)],
        save_config_kwargs={"overwrite": True},
    )
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, BatchNormDiagnosis)]
    assert (callback.fail_on, callback.ignore, callback.sample) == ("error", ("BN302", "BN401"), False)
    assert "BN302" in cli.parser.dump(cli.config)
