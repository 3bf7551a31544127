"""The probes of ActivationShiftMonitor: when they run, what they say, and that no training is lost to one."""

import pytest
import torch
from helpers.lightning_models import Classifier, loader, trainer
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn import functional as F

from bnkit.callbacks import ActivationShiftMonitor
from bnkit.dashboard.history import RunHistory
from bnkit.probes import train_eval_gap

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*no `val_dataloader`", "ignore:.*isinstance.treespec, LeafSpec."
)


def _fit(folder, model=Classifier, train=None, gap=0, covariate=0, ckpt_path=None, forward=None, loss=None, **options):
    seed_everything(7, verbose=False)
    monitor = ActivationShiftMonitor(
        every_n_steps=5,
        gap_every_n_steps=gap,
        covariate_shift_every_n_steps=covariate,
        report_dir=folder,
        forward=forward,
        loss=loss,
    )
    engine = trainer(folder, [monitor], **options)
    engine.fit(model(), loader(shuffle=False) if train is None else train, ckpt_path=ckpt_path)
    return RunHistory.load(folder / "bn_history.json").metrics, engine


def _steps(metrics, key):
    return [step for step, _ in metrics.get(key, [])]


def test_they_run_when_they_are_told_to(tmp_path):
    metrics, _ = _fit(tmp_path, gap=7, covariate=6)
    assert _steps(metrics, "bn/gap_loss") == [6, 13, 20]
    assert _steps(metrics, "bn/ics_norm") == [0, 6, 12, 18]
    metrics, _ = _fit(tmp_path)
    assert not [key for key in metrics if "gap" in key or "ics" in key or "dropout" in key or "probe" in key]


def test_the_covariate_shift_can_be_measured_at_every_step(tmp_path):
    metrics, _ = _fit(tmp_path, covariate=1, max_epochs=1)
    assert _steps(metrics, "bn/ics_norm") == list(range(12))


def test_under_accumulation_the_covariate_shift_is_that_of_the_optimizers_step(tmp_path):
    metrics, _ = _fit(tmp_path, covariate=1, max_epochs=1, accumulate_grad_batches=4)
    assert _steps(metrics, "bn/ics_norm") == [0, 1, 2]
    assert all(value > 0 for _, value in metrics["bn_ics/net_bn2"])


def test_a_resumed_run_counts_on_to_its_gap(tmp_path):
    _, engine = _fit(tmp_path, gap=18, max_epochs=1)
    engine.save_checkpoint(tmp_path / "half.ckpt")
    metrics, _ = _fit(tmp_path, gap=18, ckpt_path=tmp_path / "half.ckpt")
    assert _steps(metrics, "bn/gap_loss") == [17]


def test_a_second_fit_counts_anew(tmp_path):
    seed_everything(7, verbose=False)
    monitor = ActivationShiftMonitor(gap_every_n_steps=8, report_dir=tmp_path)
    for _ in range(2):
        trainer(tmp_path, [monitor], max_epochs=1).fit(Classifier(), loader())
        assert _steps(RunHistory.load(tmp_path / "bn_history.json").metrics, "bn/gap_loss") == [7]


def test_the_gap_is_that_of_the_batch_and_the_weights_before_the_step(tmp_path):
    class Measures(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                self.gap = train_eval_gap(self, batch)

    seed_everything(7, verbose=False)
    model = Measures()
    monitor = ActivationShiftMonitor(gap_every_n_steps=4, report_dir=tmp_path)
    trainer(tmp_path, [monitor], max_epochs=1, max_steps=4).fit(model, loader())
    metrics = RunHistory.load(tmp_path / "bn_history.json").metrics
    assert metrics["bn/gap_loss"] == [(3, model.gap.loss)]
    assert metrics["bn/gap_disagreement"] == [(3, model.gap.disagreement)]
    assert metrics["bn/gap_output"] == [(3, model.gap.output)]


# --- what cannot be measured


class TakesPairs(Classifier):
    def forward(self, x, y):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(*batch), batch[1])


class TakesLatents(Classifier):
    """As a GAN: what the module's forward takes is not in the batch."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NamesKeys(Classifier):
    def forward(self, x):
        return {"logits": self.net(x)}["scores"]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("model", [TakesPairs, TakesLatents, NamesKeys])
def test_a_module_that_the_probes_cannot_run_is_told_so_once_and_trained(tmp_path, model):
    with pytest.warns(UserWarning, match="not measured from now on") as caught:
        metrics, engine = _fit(tmp_path, model, gap=2, covariate=2)
    told = [str(w.message) for w in caught if "not measured" in str(w.message)]
    assert len(told) == 2
    assert sorted(text.split(" is not")[0] for text in told) == ["The internal covariate shift", "The train-eval gap"]
    assert "forward=" in told[0]
    assert engine.global_step == 24
    assert not [key for key in metrics if "gap" in key or "ics" in key]


def test_the_users_forward_and_loss_are_used(tmp_path):
    metrics, _ = _fit(
        tmp_path,
        TakesPairs,
        gap=5,
        covariate=5,
        forward=lambda module, batch: module(*batch),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]) * 1000,
    )
    assert max(abs(value) for _, value in metrics["bn/gap_loss"]) > 20
    assert metrics["bn/ics_norm"]


def test_without_a_loss_the_rest_of_the_gap_is_measured(tmp_path):
    class Reconstructs(Classifier):
        def training_step(self, batch, batch_idx):
            return self(batch["x"]).square().mean()

        def forward(self, x):
            return self.net(x)

    train = torch.utils.data.DataLoader([{"x": torch.randn(2, 8, 8)} for _ in range(24)], batch_size=4)
    with pytest.warns(UserWarning, match="covariate shift is not measured.*no loss is known"):
        metrics, _ = _fit(tmp_path, Reconstructs, train=train, gap=2, covariate=2)
    assert metrics["bn/gap_output"]
    assert "bn/gap_loss" not in metrics


def test_a_gap_that_fails_leaves_modes_and_buffers_as_they_were(tmp_path):
    def fails(module, batch):
        module(batch[0])
        raise RuntimeError("no luck")

    class Checks(Classifier):
        def training_step(self, batch, batch_idx):
            assert all(m.training for m in self.modules())
            assert self.net.bn1.num_batches_tracked == self.trainer.global_step
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"train-eval gap is not measured .*\(RuntimeError: no luck\)"):
        _, engine = _fit(tmp_path, Checks, gap=1, covariate=0, forward=fails)
    assert engine.global_step == 24
