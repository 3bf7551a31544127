"""BatchNormSwap: when it swaps, what training goes on with, and what checkpoints know."""

import logging

import pytest
import torch
import torch.distributed as dist
from helpers.lightning_models import Classifier, Images, loader, trainer
from helpers.references import ConvNet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

import bnkit
from bnkit.callbacks import BatchNormRecalibration, BatchNormSwap
from bnkit.callbacks.swap_state import swap_as_saved
from bnkit.norms import (
    Domain,
    Frozen,
    Ghost,
    Group,
    MovingAverage,
    NormBatch,
    Renorm,
    Sync,
    spec_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*sampler has shuffling"
)


def _fit(folder, callbacks=(), model=None, train=None, ckpt_path=None, engine=None, **options):
    seed_everything(7, verbose=False)
    model = Classifier(dropout=0.3) if model is None else model
    engine = trainer(folder, callbacks, **options) if engine is None else engine
    train = loader(shuffle=False) if train is None else train
    engine.fit(model, train, loader(shuffle=False), ckpt_path=ckpt_path)
    return model, engine


def _specs(model):
    return [spec_of(model.net.bn1), spec_of(model.net.bn2)]


class Notes(Callback):
    """What the layers were at each training batch, and the averages' and step's state at the end of each epoch."""

    def __init__(self):
        self.specs, self.validated = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.specs.append((trainer.current_epoch, _specs(pl_module)[0]))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(_specs(pl_module)[0])

    def by_epoch(self):
        return [next(spec for epoch, spec in self.specs if epoch == e) for e in sorted({e for e, _ in self.specs})]


# --- training is not disturbed


@pytest.mark.parametrize("rules", [None, {}, {"net.bn*": None}, NormBatch(4), "NormBatch(4)"])
def test_rules_that_change_nothing_leave_training_bit_identical(tmp_path, rules):
    plain, _ = _fit(tmp_path)
    ours, _ = _fit(tmp_path, [BatchNormSwap(rules)])
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())
    assert _specs(ours) == [None, None]


def test_the_same_as_a_model_swapped_by_hand(tmp_path):
    seed_everything(7, verbose=False)
    model = Classifier(dropout=0.3)
    bnkit.swap(model, {"net.bn1": Ghost(2), "*": MovingAverage(4, 2, 4)})
    by_hand, _ = _fit(tmp_path, model=model)
    seed_everything(7, verbose=False)
    callback = BatchNormSwap({"net.bn1": Ghost(2), "*": MovingAverage(4, 2, 4)})
    ours, _ = _fit(tmp_path, [callback], model=Classifier(dropout=0.3))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in by_hand.state_dict().items())
    assert callback.conversion.layers["net.bn1"].after == Ghost(2)


def test_none_of_the_modules_hooks_stays_wrapped(tmp_path):
    model, _ = _fit(tmp_path, [BatchNormSwap(Ghost(2))], max_epochs=1)
    assert not {"configure_model", "setup", "on_load_checkpoint"} & model.__dict__.keys()

    class Fails(Callback):
        def setup(self, trainer, pl_module, stage):
            assert "on_load_checkpoint" in pl_module.__dict__
            raise RuntimeError("no luck")

    model = Classifier()
    with pytest.raises(RuntimeError, match="no luck"):
        _fit(tmp_path, [BatchNormSwap(Ghost(2)), Fails()], model=model)
    assert not {"configure_model", "setup", "on_load_checkpoint"} & model.__dict__.keys()


# --- wherever the layers are built


class BuiltLate(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_optimizers(self):
        self.seen_by_optimizer = _specs(self)
        return super().configure_optimizers()


class BuiltInConfigureModel(BuiltLate):
    def configure_model(self):
        if self.net is None:
            self.net = ConvNet()


class BuiltInSetup(BuiltLate):
    def setup(self, stage):
        if self.net is None:
            self.net = ConvNet()


@pytest.mark.parametrize("build", [BuiltInConfigureModel, BuiltInSetup])
def test_late_models_are_swapped_before_the_optimizers_see_them(tmp_path, build):
    model, engine = _fit(tmp_path, [BatchNormSwap(Renorm())], model=build(), max_epochs=1)
    assert model.seen_by_optimizer == [Renorm(), Renorm()]
    assert not {"configure_model", "setup"} & model.__dict__.keys()
    path = tmp_path / "late.ckpt"
    engine.save_checkpoint(path)
    fresh = build()
    trainer(tmp_path, [BatchNormSwap(Renorm())]).validate(fresh, loader(), ckpt_path=path, verbose=False)
    assert _specs(fresh) == [Renorm(), Renorm()]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("build", [Classifier, BuiltInConfigureModel])
@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_averaged_weights_are_swapped_with_the_model(tmp_path, build, ours_first):
    average = EMAWeightAveraging(decay=0.8)
    callbacks = [BatchNormSwap(Ghost(2), {1: Renorm()}), average, BatchNormRecalibration(), ModelCheckpoint(tmp_path)]
    _fit(tmp_path, callbacks if ours_first else callbacks[::-1], model=build(), max_epochs=3)
    copied = average._average_model.module
    assert _specs(copied) == [Renorm(), Renorm()]
    assert not {"configure_model", "on_load_checkpoint"} & copied.__dict__.keys()
    assert [n for n, _ in copied.named_buffers()] == [n for n, _ in average._average_model.module.named_buffers()]


def test_weight_averaging_sees_no_hook_of_ours(tmp_path, recwarn):
    _fit(tmp_path, [BatchNormSwap(Ghost(2)), WeightAveraging()], max_epochs=1)
    assert not [w for w in recwarn if "configure_model" in str(w.message)]


@pytest.mark.slow
def test_a_compiled_module_trains_by_its_rules(tmp_path):
    torch.compiler.reset()
    trained = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        seed_everything(7, verbose=False)
        model = Classifier()
        engine = trainer(tmp_path, [BatchNormSwap(Ghost(2), {1: Renorm(warmup_steps=4)})], max_epochs=3)
        engine.fit(wrap(model), loader(shuffle=False), loader(shuffle=False))
        assert _specs(model) == [Renorm(warmup_steps=4)] * 2
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


# --- schedule


def test_scheduled_rules_begin_at_their_epochs_and_optimizers_go_on(tmp_path):
    class Momenta(Callback):
        ids = ()

        def on_train_epoch_end(self, trainer, pl_module):
            state = trainer.optimizers[0].state
            self.ids += (tuple(id(state[p]["momentum_buffer"]) for p in pl_module.parameters()),)

    notes, momenta = Notes(), Momenta()
    swap = BatchNormSwap({"net.bn*": Ghost(2)}, {1: {"net.bn1": Renorm()}, 0.5: "Frozen", 3: None})
    _fit(tmp_path, [swap, notes, momenta], max_epochs=4)
    assert notes.by_epoch() == [Ghost(2), Renorm(), Frozen(), None]
    assert len(set(momenta.ids)) == 1
    assert notes.validated[:3] == [Ghost(2)] * 3  # the sanity check's two batches are the first epoch's rules too


def test_rules_apply_on_top_of_those_before(tmp_path):
    model, _ = _fit(tmp_path, [BatchNormSwap(Ghost(2), {1: {"net.bn2": Frozen(), "*": None}})], max_epochs=2)
    assert _specs(model) == [Ghost(2), Frozen()]


def test_a_layer_keeps_what_it_remembers_where_its_rule_stays(tmp_path):
    model, _ = _fit(tmp_path, [BatchNormSwap(Renorm(), {1: {"net.bn2": Frozen()}})], max_epochs=3)
    assert model.net.bn1.step == 36


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({0: "Frozen"}, "at least 1"),
        ({-1: "Frozen"}, "at least 1"),
        ({1.5: "Frozen"}, "between 0 and 1"),
        ({True: "Frozen"}, "at least 1"),
        ({"soon": "Frozen"}, "'soon'"),
        ({1: "Freeze"}, "not a spec"),
        ({1: "Frozen", "1": "Frozen"}, "twice"),
    ],
)
def test_a_schedule_that_is_none_is_refused_at_once(schedule, message):
    with pytest.raises(ValueError, match=message):
        BatchNormSwap(None, schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "Goat(2)"}, "not a spec"),
        ({"rules": Ghost(2), "on_unknown": "warn"}, "on_unknown"),
        ({"rules": Ghost(2), "device_batch": 0}, "device_batch"),
        ({"rules": Ghost(2), "device_batch": True}, "device_batch"),
    ],
)
def test_an_argument_out_of_range_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNormSwap(**options)
    with pytest.raises(TypeError, match="one spec"):
        BatchNormSwap(Ghost)


def test_keys_that_are_the_same_epoch_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"5 and 0\.5 are both epoch 5"):
        _fit(tmp_path, [BatchNormSwap(None, {5: "Frozen", 0.5: "Frozen"})], max_epochs=10)


def test_a_fraction_of_no_number_of_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Trainer\(max_epochs"):
        _fit(tmp_path, [BatchNormSwap(None, {0.5: "Frozen"})], max_epochs=-1, max_steps=3)


def test_rules_that_begin_after_the_end_are_named(tmp_path):
    with pytest.warns(UserWarning, match="for 5 begin at epoch 5, and training ends before"):
        _fit(tmp_path, [BatchNormSwap(None, {5: "Frozen"})], max_epochs=1)


def test_rounding_of_fractions(tmp_path):
    from bnkit.callbacks.schedule import Schedule

    schedule = Schedule(None, {0.55: "Frozen", 0.25: "Ghost(2)"})
    schedule.resolve(100)
    assert schedule.due(54) == (0, 0.25)
    assert schedule.due(55) == (0, 0.25, 0.55)
    schedule.resolve(10)
    assert schedule.due(2) == (0,)
    assert schedule.due(3) == (0, 0.25)


def test_what_could_not_be_swapped_later_is_refused_at_setup(tmp_path):
    model = Classifier()
    model.net.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(ValueError, match=r"^net\.bn2: .*running statistics"):
        _fit(tmp_path, [BatchNormSwap(None, {1: Renorm()})], model=model)
    assert _specs(model) == [None, None]


def test_patterns_that_match_nothing_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"'bn1' matches no BatchNorm layer.*'net\.bn1'"):
        _fit(tmp_path, [BatchNormSwap({"bn1": Ghost(2)})], max_epochs=1)


# --- resuming


SCHEDULED = [
    (Ghost(2), None),
    (Renorm(warmup_steps=20), None),
    (MovingAverage(4, 2, 4), None),
    (Domain(("a", "b")), None),
    (NormBatch(2), {2: Frozen()}),
    (MovingAverage(4, 2, 4), {1: Renorm(warmup_steps=20), 3: Frozen(affine=False)}),
    (None, {1: Domain(("a", "b")), 2: MovingAverage(4, 2, 4)}),
    (Group(3), {2: None}),
]


@pytest.mark.parametrize(("rules", "schedule"), SCHEDULED)
@pytest.mark.parametrize("at", ["epoch=1.ckpt", "step=30.ckpt"])  # the end of an epoch, and the middle of another
def test_resuming_gives_the_uninterrupted_run(tmp_path, rules, schedule, at):
    def run(**options):
        callbacks = [
            BatchNormSwap(rules, schedule),
            ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
            ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_train_steps=30),
        ]
        return _fit(tmp_path, callbacks, model=Classifier(), max_epochs=4, **options)[0]

    whole = run()
    notes = whole.state_dict()
    resumed = run(ckpt_path=tmp_path / at)
    assert _specs(resumed) == _specs(whole)
    if at.startswith("epoch"):  # within an epoch, Lightning begins the loader anew
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in notes.items())
    assert all(value.isfinite().all() for value in resumed.state_dict().values())


def test_a_middle_of_an_epoch_is_resumed_with_its_rules_and_what_layers_remember(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=18, save_top_k=1)
    rules, schedule = Ghost(2), {1: Renorm()}
    _fit(tmp_path, [BatchNormSwap(rules, schedule), checkpoint], max_epochs=2, max_steps=18)
    steps = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append((_specs(pl_module)[0], pl_module.net.bn1.step))

    _fit(tmp_path, [BatchNormSwap(rules, schedule), First()], ckpt_path=tmp_path / "middle.ckpt")
    assert steps[0] == (Renorm(), 6)


def test_fitting_on_goes_on(tmp_path):
    callback = BatchNormSwap(Renorm())
    model, engine = _fit(tmp_path, [callback], max_epochs=1)
    engine.fit_loop.max_epochs = 2
    _fit(tmp_path, model=model, engine=engine)
    assert model.net.bn1.step == 24


def test_a_checkpoint_says_what_it_was_trained_with(tmp_path):
    _, engine = _fit(tmp_path, [BatchNormSwap(NormBatch(2), {0.5: {"net.bn1": Renorm()}})], max_epochs=2)
    engine.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = saved["callbacks"]["BatchNormSwap"]
    assert state["rules"]["start"] == {"*": "NormBatch(size=2, rounding='error')"}
    assert state["stages"] == [0, 0.5]
    assert state["plan"] == {"net.bn1": str(Renorm()), "net.bn2": "Ghost(size=2, grouping='strided')"}
    assert state["remembered"] == {"net.bn1": {"step": 12}}
    plain = Classifier()
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert saved["state_dict"].keys() == plain.state_dict().keys()


def _checkpoint(folder, *arguments, **options):
    _, engine = _fit(folder, [BatchNormSwap(*arguments)] if arguments else [], max_epochs=1, **options)
    engine.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def test_a_checkpoint_of_another_swap_says_how_it_differs(tmp_path):
    path = _checkpoint(tmp_path, {"net.bn1": Ghost(2), "*": Renorm()})
    with pytest.warns(UserWarning, match=r"net\.bn1: Ghost\(size=2.* when saved, Ghost\(size=4") as caught:
        model, _ = _fit(tmp_path, [BatchNormSwap(Ghost(4))], ckpt_path=path)
    assert [w for w in caught if "net.bn2: Renorm" in str(w.message)]
    assert _specs(model) == [Ghost(4), Ghost(4)]


def test_a_checkpoint_without_the_callback_says_so(tmp_path):
    path = _checkpoint(tmp_path)
    torch.save({**torch.load(path, weights_only=True), "callbacks": {}}, path)
    with pytest.warns(UserWarning, match="saved without BatchNormSwap"):
        model, _ = _fit(tmp_path, [BatchNormSwap(Ghost(4))], ckpt_path=path)
    assert _specs(model) == [Ghost(4), Ghost(4)]


def test_another_window_starts_empty(tmp_path):
    path = _checkpoint(tmp_path, MovingAverage(4, 2, 4))
    with pytest.warns(UserWarning, match="differ"):
        model, _ = _fit(tmp_path, [BatchNormSwap(MovingAverage(6, 2, 4))], ckpt_path=path)
    assert model.net.bn1.averages["_moving_forward"].shape == (6, 6)


# --- evaluation


@pytest.mark.parametrize(
    "rules", [Group(3), Group(3, weight_standardization=True), MovingAverage(4, 2, 4), Domain(("a", "b"))]
)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_by_the_swap_it_was_trained_with(tmp_path, rules, stage):
    trained, engine = _fit(tmp_path, [BatchNormSwap(rules)], max_epochs=1)
    engine.save_checkpoint(tmp_path / "saved.ckpt")
    fresh = Classifier()
    data = DataLoader(Images().x, 4) if stage == "predict" else loader(shuffle=False)
    arguments = {} if stage == "predict" else {"verbose": False}
    evaluation = trainer(tmp_path, [BatchNormSwap(rules)])
    getattr(evaluation, stage)(fresh, data, ckpt_path=tmp_path / "saved.ckpt", **arguments)
    x = Images().x
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), trained.eval()(x))


@pytest.mark.parametrize(
    "rules", [{"net.bn1": MovingAverage(4, 2, 4), "*": Group(3)}, Domain(("a", "b")), Sync(), None]
)
def test_a_checkpoint_can_be_loaded_as_it_was_swapped_without_a_trainer(tmp_path, rules):
    trained, engine = _fit(tmp_path, [BatchNormSwap(rules)], max_epochs=1)
    engine.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    fresh = Classifier()
    conversion = swap_as_saved(fresh, checkpoint)
    assert (conversion is None) == (rules in (None, Sync()))
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(fresh.eval()(Images().x), trained.eval()(Images().x))


def test_evaluation_goes_by_the_stage_that_was_saved(tmp_path):
    def run():
        return BatchNormSwap(None, {1: Group(3), 2: Ghost(2)})

    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model, engine = _fit(tmp_path, [run(), checkpoint], max_epochs=3)
    for epoch, spec in enumerate((None, Group(3), Ghost(2))):
        fresh = Classifier()
        trainer(tmp_path, [run()]).test(fresh, loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert _specs(fresh) == [spec, spec]
    engine.test(model, loader(), verbose=False)  # without a checkpoint: as the fit left it
    assert _specs(model) == [Ghost(2), Ghost(2)]
    with pytest.warns(UserWarning, match="No checkpoint says"):
        trainer(tmp_path, [run()]).test(Classifier(), loader(), verbose=False)


@pytest.mark.parametrize("rules", [NormBatch(1000), Sync(7)])
def test_evaluation_needs_neither_batch_nor_ranks(tmp_path, rules):
    model = Classifier()
    trainer(tmp_path, [BatchNormSwap(rules)]).validate(model, loader(), verbose=False)
    assert _specs(model) == [None, None]


# --- NormBatch


def test_norm_batch_resolves_by_the_training_loader_and_says_how(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="bnkit"):
        model, _ = _fit(tmp_path, [BatchNormSwap(NormBatch(3))], train=loader(batch_size=8), max_epochs=1)
    assert _specs(model) == [Ghost(3), Ghost(3)]
    assert "2 layers from BatchNorm2d to Ghost(size=3" in caplog.text
    assert "NormBatch(3) with 1 x 8 samples is Ghost" in caplog.text


def test_norm_batch_by_a_datamodule_or_several_loaders(tmp_path):
    class Data(LightningDataModule):
        built = 0

        def train_dataloader(self):
            self.built += 1
            return loader(batch_size=8)

    data, model = Data(), Classifier()
    trainer(tmp_path, [BatchNormSwap(NormBatch(2))], max_epochs=1, limit_val_batches=0).fit(model, data)
    assert _specs(model) == [Ghost(2), Ghost(2)]
    assert data.built == 1

    class Pairs(Classifier):
        def training_step(self, batch, batch_idx):
            return sum(super(Pairs, self).training_step(part, batch_idx) for part in batch)

    model, _ = _fit(
        tmp_path,
        [BatchNormSwap(NormBatch(2))],
        model=Pairs(),
        train=CombinedLoader([loader(batch_size=8), loader(batch_size=8)]),
        max_epochs=1,
    )
    assert _specs(model) == [Ghost(2), Ghost(2)]


class Batches:
    """An iterable of batches that says nothing about their size."""

    def __iter__(self):
        return iter([(Images().x[:4], Images().y[:4])])


@pytest.mark.parametrize("train", [Batches(), DataLoader(Images(), batch_sampler=[[0, 1], [2, 3, 4]])])
def test_a_batch_that_cannot_be_known_is_asked_for(tmp_path, train):
    with pytest.raises(MisconfigurationException, match="device_batch="):
        _fit(tmp_path, [BatchNormSwap(NormBatch(2))], train=train)
    model, _ = _fit(tmp_path, [BatchNormSwap(NormBatch(2), device_batch=4)], train=train, max_epochs=1)
    assert _specs(model) == [Ghost(2), Ghost(2)]


def test_a_size_that_is_not_to_be_had_names_the_alternatives(tmp_path):
    with pytest.raises(ValueError, match=r"^net\.bn1: .*Renorm, Group or Frozen"):
        _fit(tmp_path, [BatchNormSwap(None, {1: NormBatch(5)})])


def test_a_resumed_plan_for_another_batch_is_said(tmp_path, caplog):
    path = _checkpoint(tmp_path, NormBatch(4), train=loader(batch_size=8))
    with caplog.at_level(logging.INFO, logger="bnkit"):
        model, _ = _fit(tmp_path, [BatchNormSwap(NormBatch(4))], train=loader(batch_size=4), ckpt_path=path)
    assert _specs(model) == [None, None]
    assert "planned anew for 1 ranks: net.bn1 and 1 more: Ghost(size=4" in caplog.text


# --- refusals


def test_lightnings_own_synchronization_is_refused_with_the_cure(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"BatchNormSwap\(bnkit\.norms\.Sync\(\)\)"):
        _fit(tmp_path, [BatchNormSwap(Ghost(2))], sync_batchnorm=True)


def test_sharded_parameters_are_refused_at_setup(tmp_path):
    callback = BatchNormSwap(Ghost(2))
    engine = trainer(tmp_path, [callback])
    engine.strategy.__class__ = type("Fake", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="train with DDP"):
        callback.setup(engine, Classifier(), "fit")


def test_domains_in_other_processes_are_refused_with_the_cure(tmp_path):
    with pytest.raises(Exception, match=r"bnkit\.swap\(model, rules\) before fit"):
        _fit(tmp_path, [BatchNormSwap(Domain(("a", "b")))], strategy="ddp_fork", devices=1)


# --- LightningCLI

CLI_RULES = {
    "spec": ("{class_path: bnkit.norms.Ghost, init_args: {size: 2}}", {"*": Ghost(2)}),
    "patterns": (
        "{net.bn1: {class_path: bnkit.norms.Renorm, init_args: {r_max: 2.0}}, '*': null}",
        {"net.bn1": Renorm(r_max=2.0), "*": None},
    ),
    "string": ("Ghost(2)", {"*": Ghost(2)}),
    "strings": ("{net.bn1: Ghost(2), '*': Frozen}", {"net.bn1": Ghost(2), "*": Frozen()}),
}


@pytest.mark.parametrize("kind", CLI_RULES)
def test_lightning_cli_builds_it_from_a_config(tmp_path, kind):
    text, expected = CLI_RULES[kind]
    (tmp_path / "config.yaml").write_text(
        "trainer:\n"
        "  max_epochs: 3\n"
        "  logger: false\n"
        "  callbacks:\n"
        "  - class_path: bnkit.callbacks.BatchNormSwap\n"
        "    init_args:\n"
        f"      rules: {text}\n"
        "      schedule:\n"
        "        2: {class_path: bnkit.norms.Frozen}\n"
    )
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, BatchNormSwap)]
    assert callback.schedule._stages == {0: expected, 2: {"*": Frozen()}}


# --- several processes


class SavesPerRank(Classifier):
    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)
        self.started = []

    def on_validation_start(self):
        """Before DistributedDataParallel gives all ranks rank 0's buffers, which it does at each forward."""
        self.started.append({name: value.clone() for name, value in self.state_dict().items()})

    def on_train_end(self):
        torch.save((self.state_dict(), self.started, _specs(self)), f"{self.folder}/{self.global_rank}.pt")


def _ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


class Shares:
    """Batches of four on each of the ranks, which together are the eight of a single process."""

    batch_size = 4

    def __len__(self):
        return 6

    def __iter__(self):
        for start in range(0, 48, 8):
            rank = dist.get_rank() if dist.is_initialized() else None
            yield list(range(start, start + 8)) if rank is None else list(range(start + 4 * rank, start + 4 * rank + 4))


def _ddp(folder, callback, *others, **options):
    seed_everything(7, verbose=False)
    model = SavesPerRank(folder)
    defaults = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    engine = trainer(folder, [callback, *others], **(defaults | options))
    engine.fit(model, DataLoader(Images(), batch_sampler=Shares()), loader(shuffle=False))
    return _ranks(folder)


@pytest.mark.ddp
@pytest.mark.parametrize("rules", [Sync(), NormBatch(8)])
def test_synchronized_ranks_train_as_one_process_with_the_whole_batch(tmp_path, rules):
    (state, _, specs), (other, _, _) = _ddp(tmp_path, BatchNormSwap(rules), precision="64-true")
    assert specs == [Sync(), Sync()]
    seed_everything(7, verbose=False)
    alone = Classifier()
    train = DataLoader(Images(), batch_sampler=Shares())
    trainer(tmp_path, precision="64-true").fit(alone, train, loader(shuffle=False))
    for name, value in alone.state_dict().items():
        assert torch.equal(state[name], other[name])
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.ddp
def test_statistics_of_subgroups_are_pooled_before_validation_and_saving(tmp_path):
    for name in ("plain", "pooled", "saved"):
        (tmp_path / name).mkdir()
    plain = _ddp(tmp_path / "plain", BatchNormSwap(None), max_epochs=1)
    (state, started, _), (other, also, _) = _ddp(tmp_path / "pooled", BatchNormSwap(Sync(1)), max_epochs=1)
    for mine, theirs in ((state, other), (started[1], also[1])):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    own = [started[1]["net.bn1.running_mean"] for _, started, _ in plain]
    assert not torch.equal(*own)
    torch.testing.assert_close(started[1]["net.bn1.running_mean"], sum(own) / 2)

    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=6)
    _ddp(tmp_path / "saved", BatchNormSwap(Sync(1)), checkpoint, max_epochs=1, limit_val_batches=0)
    saved = torch.load(tmp_path / "saved" / "step=6.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.bn1.running_mean"], sum(own) / 2)


@pytest.mark.ddp
def test_scheduled_swaps_under_ddp(tmp_path):
    (state, _, specs), (other, _, _) = _ddp(tmp_path, BatchNormSwap(Ghost(2), {1: Frozen()}), max_epochs=2)
    assert specs == [Frozen(), Frozen()]
    assert all(torch.equal(value, other[name]) for name, value in state.items() if "running" not in name)


@pytest.mark.ddp
def test_freezing_parameters_under_ddp_needs_its_consent(tmp_path):
    with pytest.raises(Exception, match="ddp_find_unused_parameters_true"):
        _ddp(tmp_path, BatchNormSwap(None, {1: Frozen(affine=False)}))
    with pytest.raises(Exception, match="begin to learn"):
        _ddp(tmp_path, BatchNormSwap(Frozen(affine=False), {1: Ghost(2)}))
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
    (state, _, specs), (other, _, _) = _ddp(
        tmp_path, BatchNormSwap(None, {1: Frozen(affine=False)}), strategy=strategy, max_epochs=3
    )
    assert specs == [Frozen(affine=False)] * 2
    assert all(torch.equal(value, other[name]) for name, value in state.items() if "running" not in name)


# --- what a review found


@pytest.mark.parametrize("spec", [Renorm(warmup_steps=100), MovingAverage(window=4)])
@pytest.mark.parametrize("ours_first", [True, False])
def test_weight_averaging_does_not_average_what_layers_remember(tmp_path, spec, ours_first):
    callbacks = [BatchNormSwap(spec), EMAWeightAveraging(decay=0.9)]
    model, _ = _fit(tmp_path, callbacks if ours_first else callbacks[::-1])
    layer = model.net.bn1
    assert (layer.step if isinstance(spec, Renorm) else int(layer.averages["_moving_step"])) == 24


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_swapped_checkpoint_is_noticed_by_a_callback_that_swaps_nothing(tmp_path, evaluate):
    _, engine = _fit(tmp_path, [BatchNormSwap(Group(2))], max_epochs=1)
    engine.save_checkpoint(tmp_path / "group.ckpt")
    callbacks, options = [BatchNormSwap(None)], {"ckpt_path": tmp_path / "group.ckpt"}

    def load():
        if evaluate:
            trainer(tmp_path, callbacks).validate(Classifier(), loader(), verbose=False, **options)
        else:
            _fit(tmp_path, callbacks, **options)

    with pytest.warns(UserWarning, match=r"leaves them plain.*Group"):
        load()


def test_a_run_cut_short_takes_the_schedule_of_a_long_one(tmp_path):
    _fit(tmp_path, [BatchNormSwap(schedule={0.5: Ghost(2), 0.75: Frozen()})], fast_dev_run=True)
    with pytest.raises(ValueError, match="are both epoch 1"):
        _fit(tmp_path, [BatchNormSwap(schedule={0.4: Ghost(2), 0.5: Frozen()})], max_epochs=2)


def test_an_evaluation_that_is_skipped_leaves_a_module_that_can_be_pickled(tmp_path):
    model = Classifier()
    trainer(tmp_path, [BatchNormSwap(Ghost(2))], limit_val_batches=0).validate(model, loader(), verbose=False)
    assert "on_load_checkpoint" not in model.__dict__


class _Named(BatchNormSwap):
    """A subclass has a key of its own in checkpoints."""


class _Act(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_swapping_as_saved_leaves_out_what_was_skipped(tmp_path):
    class Mixed(Classifier):
        def __init__(self):
            super().__init__()
            self.net.bn2 = _Act(6)

    _, engine = _fit(tmp_path, [_Named(Group(2), on_unknown="skip")], model=Mixed(), max_epochs=1)
    engine.save_checkpoint(tmp_path / "mixed.ckpt")
    model = Mixed()
    swap_as_saved(model, torch.load(tmp_path / "mixed.ckpt", weights_only=True))
    assert _specs(model) == [Group(2), None]


def _batch_of_rank(folder):
    class Uneven(Classifier):
        def train_dataloader(self):
            return loader(batch_size=4 + self.global_rank)

    engine = trainer(folder, [BatchNormSwap(NormBatch(4))], strategy="ddp_fork", devices=2, max_epochs=1)
    engine.fit(Uneven())


@pytest.mark.ddp
def test_ranks_that_differ_in_their_batch_are_refused(tmp_path):
    with pytest.raises(Exception, match="the ranks differ in theirs"):
        _batch_of_rank(tmp_path)
