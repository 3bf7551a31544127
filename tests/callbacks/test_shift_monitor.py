"""ActivationShiftMonitor: training goes on as if it were not there, and what it logs is right."""

import csv
import math
import random

import numpy as np
import pytest
import torch
from helpers.lightning_models import Classifier, Images, loader, trainer
from helpers.wandb_runs import log_file, logged, offline_logger, records
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, Callback, EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bnkit
from bnkit import Moments
from bnkit.callbacks import ActivationShiftMonitor, BatchNormRecalibration, BatchNormSwap
from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS
from bnkit.norms import Ghost, Renorm

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*isinstance.treespec, LeafSpec."
)


def _fit(folder, callbacks=(), model=None, val=True, ckpt_path=None, wrap=lambda model: model, **options):
    seed_everything(7, verbose=False)
    model = Classifier(dropout=0.3) if model is None else model()
    engine = trainer(folder, callbacks, **options)
    engine.fit(wrap(model), loader(), loader(shuffle=False) if val else None, ckpt_path=ckpt_path)
    return model, engine


def _monitor(**options):
    """With all that it can do, and often."""
    defaults = {
        "every_n_steps": 3,
        "gap_every_n_steps": 2,
        "covariate_shift_every_n_steps": 2,
        "input_every_n_steps": 2,
    }
    return ActivationShiftMonitor(**(defaults | options))


# --- training is not disturbed


class Notes(Callback):
    """The data and the random states of every batch, and in the end the optimizers' states."""

    def __init__(self):
        self.seen, self.optimizers = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((batch[0].clone(), torch.get_rng_state(), random.getstate(), np.random.get_state()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        modes = [module.training for module in pl_module.modules()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pl_module.modules()]
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.seen.append((torch.get_rng_state(), modes, hooks, gradients))

    def on_train_end(self, trainer, pl_module):
        self.optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


class Checkpointed(Classifier):
    def forward(self, x):
        return self.net.head(checkpoint(self._features, x, use_reentrant=False).mean((2, 3)))

    def _features(self, x):
        x = self.net.drop(self.net.bn1(self.net.conv1(x)).relu())
        return self.net.bn2(self.net.conv2(x)).relu()


class GanLike(Classifier):
    """Two optimizers by hand, and several forwards in a step."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(m.parameters(), lr=0.01) for m in (self.net.conv1, self.net.head)]


class Shared(Classifier):
    def forward(self, x):
        x = self.net.drop(self.net.bn1(self.net.conv1(x)).relu())
        return self.net.head(self.net.bn1(self.net.conv2(x)).relu().mean((2, 3)))


class Cumulative(Classifier):
    def __init__(self):
        super().__init__(dropout=0.3)
        self.net.bn1.momentum = None


class Frozen(Classifier):
    def on_train_epoch_start(self):
        self.net.bn2.eval()


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.bn1)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.bn1, optimizer)


CASES = {
    "plain": {},
    "validation within the epoch": {"val_check_interval": 5},
    "recalibration": {"others": lambda: [BatchNormRecalibration()], "val_check_interval": 5},
    "ema": {"others": lambda: [EMAWeightAveraging(decay=0.8), BatchNormRecalibration()]},
    "accumulation": {"accumulate_grad_batches": 5},
    "bfloat16": {"precision": "bf16-mixed"},
    "compiled": {"wrap": lambda model: torch.compile(model, backend="eager"), "model": Classifier},
    "checkpointed": {"model": Checkpointed},
    "two optimizers": {"model": GanLike},
    "a shared layer": {"model": Shared},
    "momentum None": {"model": Cumulative},
    "a frozen layer": {"model": Frozen},
    "finetuning": {"others": lambda: [Finetuning()]},
    "scheduled swap": {"others": lambda: [BatchNormSwap(Ghost(2), {1: {"net.bn1": Renorm()}})]},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_to_that_without(tmp_path, case):
    options = dict(CASES[case])
    others = options.pop("others", list)
    runs = []
    for ours in ([], [_monitor()]):
        torch.compiler.reset()
        notes = Notes()
        model, _ = _fit(tmp_path, [*ours, *others(), notes], **options)
        runs.append((model.state_dict(), notes.seen, notes.optimizers, torch.get_rng_state()))
    assert len(runs[0][1]) == 48
    for plain, watched in zip(*runs, strict=True):
        assert _same(plain, watched)
    [monitor] = ours
    assert not math.isnan(monitor.snapshot.layers["net.bn1"].mean_shift), "it has seen something"


# --- the numbers


class Observed(Classifier):
    """Observes its own training steps, exactly."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def training_step(self, batch, batch_idx):
        running = {
            name: Moments(1, bn.running_mean.clone(), bn.running_var.clone())
            for name, bn in bnkit.layers.batch_norm_layers(self).items()
        }
        with bnkit.observe(self, exact=True) as seen:
            loss = super().training_step(batch, batch_idx)
        self.steps.append({name: bnkit.shift.shift(_unbiased(seen[name]), running[name]) for name in running})
        return loss


def _unbiased(moments):
    return Moments(moments.count, moments.mean, moments.var * moments.count / (moments.count - 1))


def test_every_steps_numbers_are_those_of_an_exact_observation(tmp_path):
    monitor = ActivationShiftMonitor(every_n_steps=1, report_dir=tmp_path)
    model, _ = _fit(tmp_path, [monitor], model=Observed)
    metrics = RunHistory.load(tmp_path / "bn_history.json").metrics
    for name in ("net.bn1", "net.bn2"):
        short = name.replace(".", "_")
        shifts = [step[name] for step in model.steps]
        expected = {
            "bn_shift": [float(s.mean.square().mean().sqrt()) for s in shifts],
            "bn_variance": [float(s.log_variance_ratio.mean()) for s in shifts],
            "bn_kl": [float(s.kl.mean()) for s in shifts],
        }
        for prefix, values in expected.items():
            assert [step for step, _ in metrics[f"{prefix}/{short}"]] == list(range(24))
            assert [v for _, v in metrics[f"{prefix}/{short}"]] == pytest.approx(values, rel=1e-3, abs=1e-4)
    worst = [max(float(s.kl.mean()) for s in step.values()) for step in model.steps]
    assert [value for _, value in metrics["bn/kl_worst"]] == pytest.approx(worst, rel=1e-3, abs=1e-4)


class Reports(Callback):
    def __init__(self, recalibration):
        self.recalibration, self.all = recalibration, []

    def on_validation_end(self, trainer, pl_module):
        if self.recalibration.report is not None and self.recalibration.report not in self.all:
            self.all.append(self.recalibration.report)


def test_the_estimation_shift_is_that_of_every_recalibration(tmp_path):
    recalibration = BatchNormRecalibration()
    reports = Reports(recalibration)
    _fit(tmp_path, [_monitor(report_dir=tmp_path), recalibration, reports], val_check_interval=5)
    history = RunHistory.load(tmp_path / "bn_history.json")
    every = [*reports.all, recalibration.report]
    assert len(every) == 5  # four validations, and the end
    for name, short in (("net.bn1", "net_bn1"), ("net.bn2", "net_bn2")):
        expected = [report.layers[name].shift for report in every]
        assert [value for _, value in history.metrics[f"bn_estimation/{short}"]] == expected
        rows = [row for row in history.tables["recalibrations"].records() if row["layer"] == name]
        assert [row["mean_shift"] for row in rows] == expected
        last = next(row for row in history.tables["layers"].records() if row["layer"] == name)
        assert last["estimation_shift"] == expected[-1]
    worst = [report.worst.shift for report in every]
    assert [value for _, value in history.metrics["bn/recalibration_shift_worst"]] == worst


def test_the_population_is_that_of_the_averaged_model_which_was_recalibrated(tmp_path):
    model = Classifier

    class Stops(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.channels = monitor._record.history.tables["channels"].records()

    class Validated(model):
        def on_validation_epoch_end(self):
            self.population = self.net.bn1.running_mean.clone()

    monitor, stops = _monitor(), Stops()
    callbacks = [EMAWeightAveraging(decay=0.8), BatchNormRecalibration(), monitor, stops]
    trained, _ = _fit(tmp_path, callbacks, model=Validated, max_epochs=1)
    found = [row["population_mean"] for row in stops.channels if row["layer"] == "net.bn1"]
    assert found == pytest.approx(trained.validated[-1]["net.bn1.running_mean"].tolist(), rel=1e-5)


# --- loggers


def _bn_keys(keys):
    return {key for key in keys if key.startswith("bn")}


EVERY_KEY = {key.key for key in MODEL_KEYS} | {
    f"{key.prefix}/{layer}" for key in LAYER_KEYS for layer in ("net_bn1", "net_bn2")
}


def test_a_csv_file_gets_every_key_and_no_other(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, [_monitor(), BatchNormRecalibration()], logger=logger, max_epochs=6)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert _bn_keys(rows[0]) == EVERY_KEY
    assert all(key.count("/") == 1 and "." not in key for key in _bn_keys(rows[0]))
    drawn = {key: [(int(row["step"]), float(row[key])) for row in rows if row[key]] for key in EVERY_KEY}
    assert [step for step, _ in drawn["bn/shift_worst"]] == list(range(2, 72, 3))
    assert all(math.isfinite(value) for series in drawn.values() for _, value in series)
    overheads = [value for _, value in drawn["bn/monitor_overhead"]]
    assert min(overheads) > 0
    assert len(overheads) == 24


def test_tensorboard_gets_every_key_and_no_other(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, [_monitor(), BatchNormRecalibration()], logger=logger, max_epochs=5)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert _bn_keys(events.Tags()["scalars"]) == EVERY_KEY
    assert [event.step for event in events.Scalars("bn/shift_worst")] == list(range(2, 60, 3))


@pytest.mark.parametrize("prefix", ["", "teacher"])
def test_a_wandb_run_gets_definitions_scalars_heatmap_and_tables(tmp_path, prefix):
    with offline_logger(tmp_path, prefix) as logger:
        _fit(tmp_path, [_monitor(report=False), BatchNormRecalibration()], logger=logger, max_epochs=5)
    log = log_file(tmp_path)
    join = f"{prefix}-" if prefix else ""
    assert logged(log) >= {join + key for key in EVERY_KEY}
    tables = {"bn_page/heatmap", *(f"bn_table/{name}" for name in ("layers", "alarms", "recalibrations", "channels"))}
    assert logged(log) >= {join + key for key in tables}
    assert {metric.get("name") for metric in records(log, "metric")} >= {join + key for key in EVERY_KEY}
    assert not (tmp_path / "report.html").exists()


def test_two_loggers_get_the_same_and_the_page_is_with_the_first(tmp_path):
    loggers = [CSVLogger(tmp_path, name="one", version=""), CSVLogger(tmp_path, name="two", version="", prefix="p")]
    _fit(tmp_path, [_monitor()], logger=loggers)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("one", "two")]
    assert "bn/shift_worst" in texts[0]
    assert "p-bn/shift_worst" in texts[1]
    assert texts[0].count("\n") == texts[1].count("\n")
    assert (tmp_path / "one" / "report.html").exists()
    assert not (tmp_path / "two" / "report.html").exists()


def test_accumulated_batches_are_logged_at_lightnings_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, [ActivationShiftMonitor(every_n_steps=4)], logger=logger, accumulate_grad_batches=4, max_epochs=1)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["bn/shift_worst"]] == ["0", "1", "2"]


def test_where_there_is_no_run_directory_no_page_is_written(tmp_path):
    _fit(tmp_path, [_monitor()])
    assert not list(tmp_path.rglob("*"))
    _fit(tmp_path, [_monitor(report_dir=tmp_path / "here" / "it is")])
    assert {path.name for path in (tmp_path / "here" / "it is").iterdir()} == {"report.html", "bn_history.json"}


def test_a_dry_run_writes_nothing(tmp_path):
    _fit(tmp_path, [_monitor(report_dir=tmp_path)], fast_dev_run=True)
    assert not list(tmp_path.rglob("*"))


def test_a_page_that_cannot_be_written_fails_no_fit(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match=r"could not write its page .*report_dir="):
        _, engine = _fit(tmp_path, [_monitor(report_dir=tmp_path / "taken")])
    assert engine.state.status == "finished"


# --- when, and what not


def test_the_terminal_names_the_worst_layers_and_the_page(tmp_path, capsys):
    monitor = _monitor(report_dir=tmp_path)
    _fit(tmp_path, [monitor])
    lines = capsys.readouterr().out.splitlines()
    layers = monitor.snapshot.layers
    worst = max(layers, key=lambda name: layers[name].mean_shift)
    table = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[table + 1].split()[:2] == [worst, f"{layers[worst].mean_shift:.3g}"]
    assert lines[-1] == f"All layers and steps: {tmp_path / 'report.html'}"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_does_nothing(tmp_path, capsys, stage):
    monitor = _monitor(report_dir=tmp_path)
    arguments = {} if stage == "predict" else {"verbose": False}
    data = torch.utils.data.DataLoader(Images().x, 4) if stage == "predict" else loader()
    getattr(trainer(tmp_path, [monitor]), stage)(Classifier(), data, **arguments)
    assert monitor.monitor is None
    assert "BatchNorm" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("*"))


def test_an_evaluation_after_a_fit_leaves_its_record_as_it_is(tmp_path):
    _, engine = _fit(tmp_path, [_monitor(report_dir=tmp_path)])
    before = (tmp_path / "bn_history.json").read_bytes()

    class Fails(Classifier):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("no luck")

    engine.validate(Classifier(), loader(), verbose=False)
    with pytest.raises(RuntimeError, match="no luck"):
        engine.validate(Fails(), loader(), verbose=False)
    assert (tmp_path / "bn_history.json").read_bytes() == before


def test_a_model_without_batch_norm_is_told_so_and_trained(tmp_path, capsys):
    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.net.bn1, self.net.bn2 = nn.Identity(), nn.Identity()

    monitor = _monitor(report_dir=tmp_path)
    with pytest.warns(UserWarning, match="nothing to watch: Plain has no BatchNorm layers") as caught:
        _, engine = _fit(tmp_path, [monitor], model=Plain)
    assert engine.global_step == 24
    assert len([w for w in caught if "measured" in str(w.message)]) == 0
    assert not list(tmp_path.rglob("*"))
    assert "BatchNorm" not in capsys.readouterr().out


def test_layers_frozen_by_a_hook_that_runs_later_are_read_from_their_input(tmp_path):
    monitor = _monitor()
    _fit(tmp_path, [monitor], model=Frozen, max_epochs=1)
    assert {name: m.source for name, m in monitor.snapshot.layers.items()} == {"net.bn1": "layer", "net.bn2": "input"}


def test_a_layer_unfrozen_within_an_epoch_is_soon_seen(tmp_path):
    class Thaws(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.net.bn2.train(batch_idx > 4)

    monitor = _monitor()
    _fit(tmp_path, [monitor], model=Thaws, max_epochs=1)
    assert monitor.snapshot.layers["net.bn2"].source == "layer"


@pytest.mark.parametrize("ours_first", [True, False])
def test_swaps_are_recorded_whichever_callback_comes_first(tmp_path, ours_first):
    callbacks = [_monitor(report_dir=tmp_path), BatchNormSwap({"net.bn1": Ghost(2)}, {1: {"net.bn1": Renorm()}})]
    _fit(tmp_path, callbacks if ours_first else callbacks[::-1])
    rows = RunHistory.load(tmp_path / "bn_history.json").tables["swaps"].records()
    assert [(row["step"], row["layer"], row["before"], row["after"]) for row in rows] == [
        (0, "net.bn1", "BatchNorm2d", str(Ghost(2))),
        (12, "net.bn1", str(Ghost(2)), str(Renorm())),
    ]


# --- arguments


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 0},
        {"gap_every_n_steps": -1},
        {"gap_every_n_steps": 0.5},
        {"covariate_shift_every_n_steps": -1},
        {"input_every_n_steps": 0},
        {"false_alarms_per_1000_steps": 0},
        {"window": 3},
        {"noise_level": 0},
    ],
)
def test_an_argument_out_of_range_is_named_at_once(options):
    [name] = options
    with pytest.raises(ValueError, match=f"^{name} must"):
        ActivationShiftMonitor(**options)


def test_sharded_parameters_are_refused_at_setup(tmp_path):
    monitor = ActivationShiftMonitor()
    engine = trainer(tmp_path, [monitor])
    engine.strategy.__class__ = type("Fake", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="train with DDP"):
        monitor.setup(engine, Classifier(), "fit")


def test_lightning_cli_builds_it_from_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "trainer:\n"
        "  logger: false\n"
        "  callbacks:\n"
        "  - class_path: bnkit.callbacks.ActivationShiftMonitor\n"
        "    init_args:\n"
        "      every_n_steps: 7\n"
        "      loss: null\n"
        f"      report_dir: {tmp_path}\n"
    )
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, ActivationShiftMonitor)]
    assert callback._options["every_n_steps"] == 7
