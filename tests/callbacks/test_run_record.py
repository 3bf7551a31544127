"""What a fit leaves behind: after its end, after a failure, over a resume, and in a checkpoint of a long run."""

import io
import signal

import pytest
import torch
from helpers.lightning_models import Classifier, loader, trainer
from helpers.references import ConvNet
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from bnkit.callbacks import ActivationShiftMonitor, BatchNormRecalibration, BatchNormSwap
from bnkit.dashboard.history import RunHistory
from bnkit.norms import Ghost

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*log_every_n_steps",
    "ignore:.*isinstance.treespec, LeafSpec.",
    "ignore:.*Checkpoint directory",
    "ignore:.*no `val_dataloader`",
    "ignore:.*sampler has shuffling",
)


def _monitor(folder, **options):
    return ActivationShiftMonitor(**({"every_n_steps": 6, "gap_every_n_steps": 5, "report_dir": folder} | options))


def _fit(folder, callbacks, model=Classifier, ckpt_path=None, **options):
    seed_everything(7, verbose=False)
    module = model()
    engine = trainer(folder, callbacks, **options)
    engine.fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=ckpt_path)
    return module, engine


def _history(folder):
    return RunHistory.load(folder / "bn_history.json")


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- a fit that ends


def test_a_fit_leaves_a_page_with_its_layers_and_the_modules_own_metrics(tmp_path):
    _fit(tmp_path, [_monitor(tmp_path), BatchNormRecalibration()])
    history = _history(tmp_path)
    assert history.names == {"net_bn1": "net.bn1", "net_bn2": "net.bn2"}
    assert history.info == {"model": "Classifier", "processes": "1", "steps": "24", "epochs": "2"}
    assert [step for step, _ in history.metrics["val/loss"]] == [11, 23]
    layers = history.tables["layers"].records()
    assert [(row["layer"], row["kind"], row["channels"], row["source"]) for row in layers] == [
        ("net.bn1", "BatchNorm2d", 6, "layer"),
        ("net.bn2", "BatchNorm2d", 6, "layer"),
    ]
    page = (tmp_path / "report.html").read_text()
    assert "net.bn1" in page
    assert "val/loss" in page


def test_a_second_fit_starts_anew(tmp_path):
    recalibration, monitor = BatchNormRecalibration(every_n_epochs=2), _monitor(tmp_path)
    _fit(tmp_path, [monitor, recalibration], max_epochs=2)
    first = _history(tmp_path)
    _fit(tmp_path, [monitor, recalibration], max_epochs=2)
    second = _history(tmp_path)
    timed = {"bn/monitor_overhead", "bn/probe_seconds", "bn/recalibration_seconds"}
    assert second.metrics.keys() - timed == first.metrics.keys() - timed
    assert all(second.metrics[key] == first.metrics[key] for key in first.metrics.keys() - timed)
    assert second.tables == first.tables


def test_a_checkpoint_that_was_evaluated_is_not_gone_on_from(tmp_path):
    _, engine = _fit(tmp_path, [_monitor(tmp_path)], max_epochs=1)
    engine.save_checkpoint(tmp_path / "saved.ckpt")
    monitor = _monitor(tmp_path)
    trainer(tmp_path, [monitor]).validate(Classifier(), loader(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    _fit(tmp_path, [monitor], max_epochs=1)
    assert [step for step, _ in _history(tmp_path).metrics["bn/shift_worst"]] == [5, 11]


# --- a fit that fails


class Explodes(Classifier):
    exception = RuntimeError("no luck")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 9:
            raise self.exception
        return loss


class Interrupted(Explodes):
    exception = KeyboardInterrupt()


class FrozenAndExplodes(Explodes):
    def on_train_batch_start(self, batch, batch_idx):
        self.net.bn2.eval()


@pytest.fixture
def interruptible():
    """Lightning ignores Ctrl-C from the first on, for the rest of the process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("model", "raised", "name"),
    [(Explodes, RuntimeError, "RuntimeError"), (Interrupted, SystemExit, "KeyboardInterrupt")],
)
def test_a_fit_that_fails_leaves_the_page_as_far_as_it_is_known(tmp_path, model, raised, name):
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(raised):
        _fit(tmp_path, [_monitor(None)], model=model, logger=logger)
    history = _history(tmp_path)
    assert history.info["ended by"] == name
    assert [step for step, _ in history.metrics["bn/shift_worst"]] == [5, 9]  # the last three steps too
    assert len(history.tables["layers"].rows) == 2
    assert "net.bn1" in (tmp_path / "report.html").read_text()
    assert "bn/shift_worst" in (tmp_path / "metrics.csv").read_text()


def test_the_alarm_that_explains_a_failure_is_on_the_page(tmp_path):
    class Diverges(Explodes):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] * float("inf") if self.trainer.global_step == 8 else batch[0]), batch[1]

    with pytest.raises(RuntimeError, match="no luck"):
        _fit(tmp_path, [_monitor(tmp_path, every_n_steps=50, gap_every_n_steps=0)], model=Diverges)
    [alarm] = _history(tmp_path).tables["alarms"].records()
    assert (alarm["code"], alarm["layer"], alarm["step"]) == ("nonfinite", "net.bn1", 8)


@pytest.mark.parametrize("model", [Explodes, FrozenAndExplodes])
def test_a_failure_leaves_no_hook_and_no_buffer_behind(tmp_path, model):
    seed_everything(7, verbose=False)
    module = model()
    buffers = {name: id(buffer) for name, buffer in module.named_buffers()}
    with pytest.raises(RuntimeError, match="no luck"):
        trainer(tmp_path, [_monitor(tmp_path, input_every_n_steps=1, gap_every_n_steps=2)]).fit(module, loader())
    assert _hooks(module) == 0
    assert {name: id(buffer) for name, buffer in module.named_buffers()} == buffers


def test_a_page_that_cannot_be_written_does_not_hide_the_failure(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match="no luck"):
        _fit(tmp_path, [_monitor(tmp_path / "taken")], model=Explodes)


def test_a_failure_before_the_first_step_of_a_second_fit_leaves_the_first_ones_page(tmp_path):
    class FailsAtTheSanityCheck(Classifier):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("no luck")

    monitor = _monitor(tmp_path)
    _fit(tmp_path, [monitor])
    before = (tmp_path / "bn_history.json").read_bytes()
    with pytest.raises(RuntimeError, match="no luck"):
        _fit(tmp_path, [monitor], model=FailsAtTheSanityCheck)
    assert (tmp_path / "bn_history.json").read_bytes() == before


# --- resuming

TIMED = {"bn/monitor_overhead", "bn/probe_seconds", "bn/recalibration_seconds"}


def test_a_resumed_run_has_the_history_of_the_uninterrupted_one(tmp_path):
    class Jumps(Classifier):
        def __init__(self):
            super().__init__(lr=1e-4)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] * 3 + 2 if self.current_epoch == 7 and self.trainer.training else batch[0]), batch[1]

    def run(folder, **options):
        swap = BatchNormSwap({"net.bn2": Ghost(2)})
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        monitor = _monitor(folder, window=30)
        _fit(tmp_path, [swap, monitor, BatchNormRecalibration(), checkpoint], model=Jumps, max_epochs=8, **options)
        return _history(folder)

    whole = run(tmp_path / "whole")
    assert torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"]
    resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / "epoch=3.ckpt")
    assert resumed.metrics.keys() == whole.metrics.keys()
    for key in whole.metrics.keys() - TIMED:
        assert resumed.metrics[key] == whole.metrics[key], key
    assert [row["code"] for row in whole.tables["alarms"].records()] == ["shift"], "its spread is learnt before"
    for name in ("alarms", "swaps", "recalibrations", "layers"):
        assert resumed.tables[name] == whole.tables[name], name


class Wider(Classifier):
    def __init__(self):
        super().__init__()
        self.other = torch.nn.BatchNorm2d(2)
        self.net = ConvNet(width=8)


def test_resuming_with_other_layers_goes_on_with_what_still_fits(tmp_path):
    _, engine = _fit(tmp_path, [_monitor(tmp_path)], max_epochs=1)
    engine.save_checkpoint(tmp_path / "old.ckpt")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)
    fresh = Wider()
    saved["state_dict"], saved["optimizer_states"] = (
        fresh.state_dict(),
        [torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9).state_dict()],
    )
    torch.save(saved, tmp_path / "old.ckpt")
    _fit(tmp_path, [_monitor(tmp_path)], model=Wider, ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    history = _history(tmp_path)
    assert [step for step, _ in history.metrics["bn_shift/net_bn2"]] == [5, 11, 17, 23]
    assert list(history.names.values()) == ["net.bn1", "net.bn2", "other"]


def test_a_checkpoint_without_the_callback_is_begun_from(tmp_path):
    _, engine = _fit(tmp_path, [], max_epochs=1)
    engine.save_checkpoint(tmp_path / "plain.ckpt")
    _fit(tmp_path, [_monitor(tmp_path)], ckpt_path=tmp_path / "plain.ckpt")
    assert [step for step, _ in _history(tmp_path).metrics["bn/shift_worst"]] == [17, 23]


# --- a long run


class Deep(Classifier):
    """Two hundred layers, of which most have no training of their own here."""

    def __init__(self):
        super().__init__()
        self.others = torch.nn.ModuleList(torch.nn.BatchNorm2d(64) for _ in range(200))


def test_a_checkpoint_of_a_million_steps_of_200_layers_is_bounded(tmp_path):
    monitor, deep = _monitor(None), Deep()
    trainer(tmp_path, [monitor], max_epochs=1, limit_train_batches=2).fit(deep, loader())
    record = monitor._record
    record.is_open = True
    keys = [f"{measure}/layer_{i}" for measure in ("bn_shift", "bn_kl") for i in range(200)]
    for step in range(0, 1_000_000, 1_000):
        record._recorder.log(dict.fromkeys(keys, 0.1), step)
    for step in range(100):
        for i in range(200):
            record.history.tables["recalibrations"].add(step=step, layer=f"others.{i}", mean_shift=0.1, source="layer")
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    assert file.tell() < 8 * 2**20
    file.seek(0)
    assert torch.load(file, weights_only=True)["monitor"]["layers"] == ["net.bn1", "net.bn2"] + [
        f"others.{i}" for i in range(200)
    ]
    series = [record.history.metrics[key] for key in keys]
    assert all(points[0][0] < 20_000 and points[-1][0] == 999_000 for points in series), "from its begin to its end"


def test_beyond_100_layers_the_worst_alone_are_logged(tmp_path):
    class Chain(Classifier):
        def __init__(self):
            super().__init__()
            self.others = torch.nn.Sequential(*(torch.nn.BatchNorm2d(2) for _ in range(101)))

        def forward(self, x):
            return self.net(self.others(x))

    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, [_monitor(tmp_path)], model=Chain, logger=logger, limit_train_batches=6, max_epochs=1)
    assert len([key for key in _history(tmp_path).metrics if key.startswith("bn_shift/")]) == 20
    assert len(_history(tmp_path).tables["layers"].rows) == 103
