"""BatchNormRecalibration: when it recalibrates, and what it leaves alone."""

import copy

import pytest
import torch
from helpers.lightning_models import Classifier, Images, loader, trainer, weights
from helpers.references import ConvNet, population
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn import functional as F

from bnkit import norms
from bnkit.callbacks import BatchNormRecalibration

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


def _fit(folder, callbacks=(), model=None, train=None, val=None, ckpt_path=None, **options):
    seed_everything(7, verbose=False)
    model = Classifier(dropout=0.3) if model is None else model() if isinstance(model, type) else model
    engine = trainer(folder, callbacks, **options)
    engine.fit(
        model, loader() if train is None else train, loader(shuffle=False) if val is None else val, ckpt_path=ckpt_path
    )
    return model, engine


def _is_calibrated(state, data=None, prefix="net.", rtol=1e-5):
    """Whether the statistics of the state dict are those of the data under its own weights, both layers."""
    net, seen = ConvNet(), {}
    net.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    running = {name: (bn.running_mean.clone(), bn.running_var.clone()) for name, bn in (("1", net.bn1), ("2", net.bn2))}
    x = Images().x if data is None else data
    with torch.no_grad():
        seen["1"] = population(net.conv1(x))
    mean, var = seen["1"]
    close = torch.allclose(running["1"][0].double(), mean, rtol=rtol, atol=1e-5)
    return close and torch.allclose(running["1"][1].double(), var, rtol=rtol, atol=0)


# --- training is not disturbed


@pytest.mark.parametrize("workers", [0, 2])
def test_the_weights_are_bit_identical_to_those_without(tmp_path, workers):
    runs = []
    for callbacks in ([], [BatchNormRecalibration(every_n_epochs=1)]):
        train = loader(num_workers=workers, persistent_workers=workers > 0)
        model, _ = _fit(tmp_path, callbacks, train=train, val_check_interval=3, max_epochs=2)
        runs.append((weights(model), torch.get_rng_state()))
    (plain, plain_rng), (ours, ours_rng) = runs
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert torch.equal(plain_rng, ours_rng)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 5}, {"precision": "bf16-mixed"}])
def test_the_weights_are_bit_identical_with(tmp_path, options):
    (plain, _), (ours, _) = _fit(tmp_path, **options), _fit(tmp_path, [BatchNormRecalibration()], **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True))


def test_a_compiled_module_is_trained_alike_and_calibrated(tmp_path):
    def run(callbacks):
        seed_everything(7, verbose=False)
        model = Classifier()
        trainer(tmp_path, callbacks).fit(torch.compile(model, backend="eager"), loader(), loader(shuffle=False))
        return model

    plain, ours = run([]), run([BatchNormRecalibration()])
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True))
    assert _is_calibrated(ours.validated[-1])


def test_manual_optimization_with_several_optimizers_is_not_disturbed(tmp_path):
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net.conv1, self.net.head)]

    plain, _ = _fit(tmp_path, model=Manual)
    callback = BatchNormRecalibration()
    ours, _ = _fit(tmp_path, [callback], model=Manual)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True))
    assert _is_calibrated(ours.validated[-1])


def test_a_frozen_layer_is_not_touched_though_validation_puts_all_in_evaluation_mode(tmp_path):
    class Frozen(Classifier):
        def on_train_epoch_start(self):
            self.net.bn1.eval()

    model = Frozen()
    before = {name: buffer.clone() for name, buffer in model.net.bn1.named_buffers()}
    callback = BatchNormRecalibration()
    _fit(tmp_path, [callback], model=model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.net.bn1.named_buffers())
    assert callback.report.kept == {"net.bn1": "frozen"}


@pytest.mark.parametrize("spec", [norms.Renorm(warmup_steps=1), norms.Frozen(), norms.Group(2)])
def test_statistics_that_training_normalises_by_are_left_to_it(tmp_path, spec):
    class Swapped(Classifier):
        def __init__(self):
            super().__init__()
            spec.apply(self.net.bn1)

    plain, _ = _fit(tmp_path, model=Swapped)
    callback = BatchNormRecalibration()
    ours, _ = _fit(tmp_path, [callback], model=Swapped)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True))
    assert "net.bn1" in callback.report.kept
    assert "net.bn2" in callback.report.layers


# --- when


class _Count(Callback):
    def __init__(self, recalibration):
        self.recalibration, self.at, self.last = recalibration, [], None

    def on_validation_end(self, trainer, pl_module):
        if self.recalibration.report is not self.last:
            self.last = self.recalibration.report
            self.at.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 6), (0, 12), (1, 18), (1, 24), (2, 30), (2, 36)]),
        ({"every_n_epochs": 2}, [(1, 18), (1, 24)]),
        ({"every_n_steps": 12}, [(0, 12), (1, 24), (2, 36)]),
        ({"every_n_epochs": 0}, []),
    ],
)
def test_it_recalibrates_when_it_is_told_to(tmp_path, options, expected):
    recalibration = BatchNormRecalibration(**options)
    count = _Count(recalibration)
    _fit(tmp_path, [count, recalibration], val_check_interval=6, max_epochs=3)
    assert count.at == expected
    assert recalibration.report is not None, "at the end of fit"


def test_the_sanity_check_and_validate_and_test_recalibrate_nothing(tmp_path):
    callback = BatchNormRecalibration()
    engine = trainer(tmp_path, [callback], max_epochs=1)
    model = Classifier()
    state = copy.deepcopy(model.state_dict())
    engine.validate(model, loader(), verbose=False)
    engine.test(model, loader(), verbose=False)
    assert callback.report is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    engine.fit(model, loader(), loader())
    state, report = copy.deepcopy(model.state_dict()), callback.report
    engine.validate(model, loader(), verbose=False)
    engine.test(model, loader(), verbose=False)
    assert callback.report is report
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    engine.fit_loop.max_epochs = 2
    engine.fit(model, loader(), loader())  # what the recalibration left can be trained with
    assert callback.report is not report


def test_without_validation_it_recalibrates_at_the_end(tmp_path):
    model, _ = _fit(tmp_path, [BatchNormRecalibration()], val=[])
    assert _is_calibrated(model.state_dict())
    seed_everything(7)
    untouched, _ = _fit(tmp_path, [BatchNormRecalibration(at_fit_end=False)], val=[])
    assert not _is_calibrated(untouched.state_dict())


def test_the_end_does_not_repeat_what_the_last_validation_did(tmp_path):
    callback = BatchNormRecalibration()
    count = _Count(callback)
    _fit(tmp_path, [callback, count])
    assert callback.report is count.last


def test_the_end_recalibrates_what_batches_without_a_step_have_changed(tmp_path):
    class Accumulates(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx == 5:
                self.optimizers().step()

    # The last validation is after batch 10 of 12; batches 11 and 12 move the running statistics, but no weights.
    model, _ = _fit(tmp_path, [BatchNormRecalibration()], model=Accumulates, val_check_interval=10, max_epochs=1)
    assert len(model.validated) == 1
    assert _is_calibrated(model.state_dict())


def test_a_callback_used_again_counts_its_steps_from_the_new_fit(tmp_path):
    callback = BatchNormRecalibration(every_n_steps=12)
    _fit(tmp_path, [callback], max_epochs=3)
    model, _ = _fit(tmp_path, [callback], max_epochs=1)
    assert _is_calibrated(model.validated[-1])


# --- what was validated is what was saved


@pytest.mark.parametrize("mid_epoch", [False, True])
def test_the_checkpoint_has_the_statistics_of_the_validation(tmp_path, mid_epoch):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{step}")
    options = {"val_check_interval": 5} if mid_epoch else {}
    model, _ = _fit(tmp_path, [checkpoint, BatchNormRecalibration()], **options)
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in sorted(checkpoint.best_k_models, key=_step)]
    assert len(saved) == len(model.validated) == (4 if mid_epoch else 2)
    for state, validated in zip(saved, model.validated, strict=True):
        assert all(torch.equal(state[name], validated[name]) for name in state)
        assert _is_calibrated(state)


def _step(path):
    return int(path.split("=")[-1].split(".")[0].split("-")[0])


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
    "equal": lambda: WeightAveraging(),
}


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_are_calibrated_validated_and_saved_in_either_order(tmp_path, kind, ours_first):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{step}")
    callbacks = [BatchNormRecalibration(), AVERAGING[kind]()]
    model, _ = _fit(tmp_path, [checkpoint, *(callbacks if ours_first else callbacks[::-1])])
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in sorted(checkpoint.best_k_models, key=_step)]
    assert len(saved) == len(model.validated) == 2
    for state, validated in zip(saved, model.validated, strict=True):
        assert all(torch.equal(state[name], validated[name]) for name in validated)
        assert _is_calibrated(state)
    assert _is_calibrated(model.state_dict()), "the averaged weights that fit leaves behind"
    final = weights(model)
    assert all(torch.equal(final[name], saved[-1][name]) for name in final)


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights_are_calibrated_at_the_end_of_a_fit_without_validation(tmp_path, ours_first):
    callbacks = [BatchNormRecalibration(), EMAWeightAveraging(decay=0.8)]
    model, _ = _fit(tmp_path, callbacks if ours_first else callbacks[::-1], val=[])
    assert _is_calibrated(model.state_dict())


def test_an_average_that_moves_after_it_was_validated_is_warned_of(tmp_path):
    class ByEpoch(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    with pytest.warns(UserWarning, match="save_on_train_epoch_end=False"):
        _fit(tmp_path, [ByEpoch(), BatchNormRecalibration()])


@pytest.mark.parametrize("ours_first", [True, False])
def test_stochastic_weight_averaging_is_calibrated_and_validated(tmp_path, ours_first):
    callbacks = [BatchNormRecalibration(), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    model, _ = _fit(tmp_path, callbacks if ours_first else callbacks[::-1], max_epochs=3)
    assert _is_calibrated(model.validated[-1])
    assert _is_calibrated(model.state_dict())
    assert all(torch.equal(w, model.validated[-1][name]) for name, w in weights(model).items())
    assert model.net.bn1.momentum == 0.1


def test_it_runs_after_the_other_callbacks_and_before_checkpoints(tmp_path):
    ours, other, checkpoint = BatchNormRecalibration(), Callback(), ModelCheckpoint(tmp_path)
    _, engine = _fit(tmp_path, [ours, checkpoint, other], max_epochs=1)
    assert engine.callbacks.index(other) < engine.callbacks.index(ours) < engine.callbacks.index(checkpoint)
    assert len(engine.callbacks) == len(set(map(id, engine.callbacks)))


def test_resuming_in_the_middle_gives_the_uninterrupted_run(tmp_path):
    def run(**options):
        callbacks = [
            BatchNormRecalibration(every_n_steps=20),
            ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
        ]
        return _fit(tmp_path, callbacks, train=loader(shuffle=False), model=Classifier, max_epochs=4, **options)[0]

    whole = run()
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert len(resumed.validated) == 2
    for a, b in ((whole.state_dict(), resumed.state_dict()), (whole.validated[-1], resumed.validated[-1])):
        assert all(torch.equal(a[name], b[name]) for name in a)


# --- how the model is run


def test_batches_take_lightnings_way(tmp_path):
    class Hooked(Classifier):
        calls = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls += (("before", self.trainer.training, self.training),)
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x * 2 if self.trainer.training else x), y

    model, _ = _fit(tmp_path, [BatchNormRecalibration()], model=Hooked(), max_epochs=1)
    assert _is_calibrated(model.validated[-1], data=Images().x * 2)
    assert ("before", True, True) in model.calls


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_the_forward_runs_in_the_trainers_precision(tmp_path, precision):
    dtypes = set()
    model = Classifier()
    model.net.bn1.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    callback = BatchNormRecalibration()
    _fit(tmp_path, [callback], model=model, precision=precision, max_epochs=1)
    assert dtypes == {torch.float64 if precision == "64-true" else torch.bfloat16}
    assert callback.report.samples == 48
    assert torch.get_default_dtype() == torch.float32


def test_layers_made_in_configure_model_are_found(tmp_path):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = ConvNet()

    model, _ = _fit(tmp_path, [BatchNormRecalibration()], model=Late())
    assert _is_calibrated(model.validated[-1])


def test_a_forward_of_the_users_own(tmp_path):
    class Forwardless(Classifier):
        forward = nn.Module.forward

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

        def validation_step(self, batch, batch_idx):
            self.validated.append(copy.deepcopy(self.state_dict()))

    def dicts(items):
        return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}

    options = {"train": loader(collate_fn=dicts), "val": loader(collate_fn=dicts)}
    model, _ = _fit(
        tmp_path, [BatchNormRecalibration(forward=lambda m, batch: m.net(batch["x"]))], model=Forwardless(), **options
    )
    assert _is_calibrated(model.validated[-1])
    with pytest.raises(TypeError, match="forward="):
        _fit(tmp_path, [BatchNormRecalibration()], model=Forwardless(), **options)


def test_a_model_without_batch_norm_is_told_so_and_trained(tmp_path):
    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.net.bn1, self.net.bn2 = nn.Identity(), nn.Identity()

    with pytest.warns(UserWarning, match="nothing to do: Plain"):
        _fit(tmp_path, [BatchNormRecalibration()], model=Plain())


# --- logging, options, refusals


def test_it_logs_a_few_scalars_to_any_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = BatchNormRecalibration(max_samples=20)
    _fit(tmp_path, [callback], logger=logger, max_epochs=1)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    values = {name: [row.split(",")[columns.index(name)] for row in rows] for name in columns}
    row = next(i for i, value in enumerate(values["bn/recalibration_samples"]) if value)
    assert float(values["bn/recalibration_samples"][row]) == 20
    assert float(values["bn/recalibration_shift_worst"][row]) == pytest.approx(callback.report.worst.shift)
    assert float(values["bn/recalibration_shift_median"][row]) == pytest.approx(callback.report.median_shift)
    assert float(values["bn/recalibration_seconds"][row]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": -1}, "every_n_epochs"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_epochs": 0, "at_fit_end": False}, "never"),
        ({"max_samples": 0}, "max_samples"),
        ({"tolerance": -1}, "tolerance"),
        ({"consistency": "x"}, "consistency"),
    ],
)
def test_an_argument_out_of_range_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNormRecalibration(**options)


def test_sharded_parameters_are_refused_at_setup(tmp_path):
    callback = BatchNormRecalibration()
    engine = trainer(tmp_path, [callback])
    engine.strategy.__class__ = type("Fake", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="train with DDP"):
        callback.setup(engine, Classifier(), "fit")


def test_a_failing_recalibration_leaves_the_model_to_be_saved(tmp_path):
    def explode(model, batch):
        raise RuntimeError("boom")

    model = Classifier()
    with pytest.raises(RuntimeError, match="boom"):
        _fit(tmp_path, [BatchNormRecalibration(forward=explode)], model=model)
    assert model.net.bn1.momentum == 0.1
    assert model.net.bn1.running_mean.isfinite().all()
