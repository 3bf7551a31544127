"""ActivationShiftMonitor over two real processes: rank 0's numbers, or the average, and never a wait without an end."""

from datetime import timedelta

import pytest
import torch
from helpers.lightning_models import Classifier, loader, trainer
from helpers.wandb_runs import log_file, logged, offline_logger
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy

import bnkit
from bnkit import Moments
from bnkit.callbacks import ActivationShiftMonitor, BatchNormRecalibration, BatchNormSwap
from bnkit.dashboard.history import RunHistory
from bnkit.norms import Sync
from bnkit.shift import shift

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*log_every_n_steps",
        "ignore:.*isinstance.treespec, LeafSpec.",
        "ignore:.*no `val_dataloader`",
    ),
]


class Observed(Classifier):
    """Observes its own training steps, exactly, by the buffers that DistributedDataParallel has broadcast."""

    def __init__(self, folder):
        super().__init__(dropout=0.3)
        self.folder, self.steps = str(folder), []

    def training_step(self, batch, batch_idx):
        bn = self.net.bn1
        running = Moments(1, bn.running_mean.clone(), bn.running_var.clone())
        with bnkit.observe(self, exact=True) as seen:
            loss = super().training_step(batch, batch_idx)
        found = seen["net.bn1"]
        batch_moments = Moments(found.count, found.mean, found.var * found.count / (found.count - 1))
        self.steps.append(float(shift(batch_moments, running).mean.square().mean()))
        return loss

    def on_train_end(self):
        states = (self.state_dict(), [o.state_dict() for o in self.trainer.optimizers], torch.get_rng_state())
        torch.save((self.steps, states), f"{self.folder}/{self.global_rank}.pt")


def _ddp(folder, *callbacks, val=False, **options):
    folder.mkdir(exist_ok=True)
    seed_everything(7, verbose=False)
    engine = trainer(folder, callbacks, **({"strategy": "ddp_fork", "devices": 2} | options))
    engine.fit(Observed(folder), loader(), loader(shuffle=False) if val else None)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _monitor(folder, **options):
    defaults = {"every_n_steps": 1, "gap_every_n_steps": 2, "covariate_shift_every_n_steps": 3}
    return ActivationShiftMonitor(**(defaults | {"report_dir": folder} | options))


def _series(folder, key="bn_shift/net_bn1"):
    return [value for _, value in RunHistory.load(folder / "bn_history.json").metrics[key]]


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def test_by_itself_the_numbers_are_those_of_rank_0(tmp_path):
    (own, _), _ = _ddp(tmp_path, _monitor(tmp_path))
    assert _series(tmp_path) == pytest.approx([value**0.5 for value in own], rel=1e-3)


def test_across_ranks_the_numbers_are_the_average_by_the_buffers_that_were_broadcast(tmp_path):
    (one, _), (other, _) = _ddp(tmp_path, _monitor(tmp_path, across_ranks=True))
    assert one != other
    expected = [((a + b) / 2) ** 0.5 for a, b in zip(one, other, strict=True)]
    assert _series(tmp_path) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("across_ranks", [False, True])
@pytest.mark.parametrize("swap", [None, Sync()])
def test_training_on_every_rank_is_bit_identical_to_that_without(tmp_path, across_ranks, swap):
    runs = []
    for name in ("plain", "watched"):
        ours = [_monitor(tmp_path, across_ranks=across_ranks)] if name == "watched" else []
        callbacks = [*ours, BatchNormSwap(swap), BatchNormRecalibration()]
        runs.append([states for _, states in _ddp(tmp_path / name, *callbacks, val=True, val_check_interval=4)])
    assert _equal(*runs)
    assert len(_series(tmp_path, "bn/gap_loss")) == 6
    assert len(_series(tmp_path, "bn/ics_norm")) == 4


def test_layers_that_are_synchronized_later_are_probed_on_all_ranks_from_then_on(tmp_path):
    _ddp(tmp_path, _monitor(tmp_path), BatchNormSwap(None, {1: Sync()}))
    assert len(_series(tmp_path, "bn/gap_loss")) == 6
    rows = RunHistory.load(tmp_path / "bn_history.json").tables["swaps"].records()
    assert {(row["step"], row["after"]) for row in rows} == {(6, str(Sync()))}


def _fails_on_rank_1(output, batch):
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("no luck on this rank")
    return output.square().mean()


def test_a_gap_that_fails_on_one_rank_is_left_out_on_all_where_they_wait_for_each_other(tmp_path):
    monitor = _monitor(tmp_path, loss=_fails_on_rank_1, covariate_shift_every_n_steps=0)
    _ddp(tmp_path, monitor, BatchNormSwap(Sync()))
    assert len(_series(tmp_path, "bn/gap_loss")) == 1
    assert len(_series(tmp_path)) == 12


def test_a_failure_on_one_rank_ends_the_fit(tmp_path):
    class Fails(Observed):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 3:
                raise RuntimeError("no luck")
            return super().training_step(batch, batch_idx)

    engine = trainer(tmp_path, [_monitor(tmp_path, across_ranks=True)], strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match="no luck"):
        engine.fit(Fails(tmp_path), loader())


class _Gathers(Observed):
    """Logs an average over ranks and epoch, and speaks to the other ranks before Lightning has reduced it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self):
        gathered = self.all_gather(torch.tensor(float(self.global_rank)))
        assert gathered.tolist() == [0.0, 1.0]


def test_what_the_module_logs_of_an_epoch_is_reduced_by_all_ranks_together(tmp_path):
    engine = trainer(tmp_path, [_monitor(tmp_path)], strategy=_impatient(), devices=2)
    engine.fit(_Gathers(tmp_path), loader())
    assert _series(tmp_path, "train/loss")[-1] == pytest.approx(float(engine.callback_metrics["train/loss"]))


def _impatient():
    """With a timeout, so that ranks that wait for different things fail, and do not wait for half an hour."""
    return DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))


def test_across_ranks_a_wandb_run_is_written_by_rank_0(tmp_path):
    with offline_logger(tmp_path) as logger:
        assert logger.experiment.id  # begun before the processes are
        _ddp(tmp_path, _monitor(tmp_path, across_ranks=True), logger=logger, max_epochs=1)
    assert logged(log_file(tmp_path)) >= {"bn/shift_worst", "bn_shift/net_bn1", "bn_table/layers"}
