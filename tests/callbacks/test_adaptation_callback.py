"""BatchNormAdaptation: by which statistics each loader is tested, and that the model comes back as it was."""

import copy
import signal

import pytest
import torch
from helpers.lightning_models import Classifier, Images, loader, trainer, weights
from helpers.processes import run
from helpers.references import population
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import bnkit
from bnkit import norms
from bnkit.callbacks import ActivationShiftMonitor, BatchNormAdaptation, BatchNormRecalibration, BatchNormSwap

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*isinstance.treespec"
)


class Shifted(Images):
    """Another domain: the same images on another scale."""

    def __init__(self, scale=3.0, offset=5.0, length=48, seed=1):
        super().__init__(length, seed)
        self.x = self.x * scale + offset


class Watched(Classifier):
    """Keeps the state by which each batch was tested or predicted, by loader."""

    def __init__(self):
        super().__init__()
        self.used = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        x = batch[0] if isinstance(batch, list | tuple) else batch
        states = self.used.setdefault(dataloader_idx, [])
        states.append(copy.deepcopy({name: value.clone() for name, value in self.net.state_dict().items()}))
        return self(x)

    predict_step = validation_step = test_step


def _model():
    """A model that has been trained for a little, so that its statistics are no defaults."""
    torch.manual_seed(3)
    model = Watched()
    model.net.train()
    with torch.no_grad():
        for _ in range(20):
            model.net(Images().x)
    return model


def _loader(data=None, batch_size=16, **options):
    return DataLoader(Shifted() if data is None else data, batch_size=batch_size, **options)


def _target(model, x, prior=0.0):
    """The statistics that both layers should have, layer by layer in float64, as at inference."""
    net = copy.deepcopy(model.net).double().eval()
    found = []
    x = x.double()
    with torch.no_grad():
        for conv, bn in ((net.conv1, net.bn1), (net.conv2, net.bn2)):
            hidden = conv(x)
            weight = prior / (prior + len(x))
            for buffer, seen in zip((bn.running_mean, bn.running_var), population(hidden), strict=True):
                buffer.copy_(weight * buffer + (1 - weight) * seen)
            found += [bn.running_mean.clone(), bn.running_var.clone()]
            x = bn(hidden).relu()
    return found


def _statistics(state):
    return [state[f"{bn}.{which}"].double() for bn in ("bn1", "bn2") for which in ("running_mean", "running_var")]


def _assert_used(model, index, expected, rtol=1e-4):
    for state in model.used[index]:
        torch.testing.assert_close(_statistics(state), expected, rtol=rtol, atol=1e-5)


def _state(model):
    return {
        "tensors": {
            name: (id(tensor), tensor.is_inference(), tensor.detach().clone())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        },
        "modes": {name: module.training for name, module in model.named_modules()},
        "momenta": {name: getattr(module, "momentum", None) for name, module in model.named_modules()},
    }


def _assert_as_before(model, before):
    after = _state(model)
    assert after["modes"] == before["modes"]
    assert after["momenta"] == before["momenta"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, inference, value) in before["tensors"].items():
        assert after["tensors"][name][:2] == (identity, inference), name
        assert torch.equal(after["tensors"][name][2], value), name


def _call(verb, engine, model, loaders, **options):
    quiet = {} if verb == "predict" else {"verbose": False}
    return getattr(engine, verb)(model, dataloaders=loaders, **quiet, **options)


# --- by which statistics


@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_every_batch_is_met_by_the_targets_statistics_and_the_model_comes_back(tmp_path, verb, inference_mode):
    model, data = _model(), Shifted()
    before, expected = _state(model), _target(model, data.x)
    callback = BatchNormAdaptation(consistency="population")
    _call(verb, trainer(tmp_path, [callback], inference_mode=inference_mode), model, _loader(data))
    assert len(model.used[0]) == 3
    _assert_used(model, 0, expected)
    assert callback.reports[0].samples == 48
    _assert_as_before(model, before)


@pytest.mark.parametrize("prior", [10, 1000])
def test_the_source_counts_as_many_samples_as_it_is_told_to(tmp_path, prior):
    model, data = _model(), Shifted()
    expected = _target(model, data.x, prior)
    trainer(tmp_path, [BatchNormAdaptation(prior_samples=prior)]).test(model, _loader(data), verbose=False)
    _assert_used(model, 0, expected)


def test_with_a_prior_it_takes_a_pass_a_layer_and_without_one_a_single_pass(tmp_path):
    passes = []
    for options in ({}, {"prior_samples": 8}, {"prior_samples": 8, "consistency": "batch"}):
        callback = BatchNormAdaptation(**options)
        trainer(tmp_path, [callback]).test(_model(), _loader(), verbose=False)
        passes.append(callback.reports[0].passes)
    assert passes == [1, 2, 1]


def test_each_loader_is_adapted_to_from_the_source_and_not_from_the_one_before(tmp_path):
    sets = [Shifted(), Shifted(0.5, -2.0, seed=2), Images()]
    together, prior = _model(), 30
    before, expected = _state(together), [_target(together, data.x, prior) for data in sets]
    callback = BatchNormAdaptation(prior_samples=prior)
    trainer(tmp_path, [callback]).predict(together, [_loader(data) for data in sets])
    assert list(callback.reports) == [0, 1, 2]
    for index in range(3):
        _assert_used(together, index, expected[index])
        alone = _model()
        trainer(tmp_path, [BatchNormAdaptation(prior_samples=prior)]).predict(alone, _loader(sets[index]))
        pairs = zip(_statistics(alone.used[0][0]), _statistics(together.used[index][0]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "a loader alone gets the same bits"
    _assert_as_before(together, before)


def test_loaders_are_chosen_by_position_or_by_name(tmp_path):
    model = _model()
    source = _statistics(model.net.state_dict())
    callback = BatchNormAdaptation(dataloaders=[1])
    trainer(tmp_path, [callback]).test(model, [_loader(), _loader()], verbose=False)
    assert list(callback.reports) == [1]
    _assert_used(model, 0, source)
    assert not torch.allclose(_statistics(model.used[1][0])[0], source[0])
    callback = BatchNormAdaptation(dataloaders=["rain"])
    trainer(tmp_path, [callback]).test(_model(), {"sun": _loader(), "rain": _loader()}, verbose=False)
    assert list(callback.reports) == ["rain"]
    with pytest.raises(ValueError, match=r"\['snow'\] names no loaders of the trainer: it has \['sun', 'rain'\]"):
        trainer(tmp_path, [BatchNormAdaptation(dataloaders=["snow"])]).test(
            _model(), {"sun": _loader(), "rain": _loader()}, verbose=False
        )


def test_a_datamodules_loaders_are_adapted_to(tmp_path):
    class Data(LightningDataModule):
        def test_dataloader(self):
            return [_loader(), _loader(Images())]

    model, callback = _model(), BatchNormAdaptation(consistency="population")
    expected = _target(model, Shifted().x)
    trainer(tmp_path, [callback]).test(model, datamodule=Data(), verbose=False)
    assert list(callback.reports) == [0, 1]
    _assert_used(model, 0, expected)


def test_loaders_that_are_read_together_are_one(tmp_path):
    class Both(Watched):
        def test_step(self, batch, batch_idx):
            return super().test_step(batch["a"], batch_idx)

    model = Both()
    model.load_state_dict(_model().state_dict())
    combined = CombinedLoader({"a": _loader(), "b": _loader(Images())}, "min_size")
    callback = BatchNormAdaptation(consistency="population", forward=lambda m, batch: m(batch["a"][0]))
    expected = _target(model, Shifted().x)
    trainer(tmp_path, [callback]).test(model, combined, verbose=False)
    assert list(callback.reports) == [0]
    _assert_used(model, 0, expected)


def test_labels_are_not_looked_at(tmp_path):
    class Labelless(Shifted):
        def __init__(self):
            super().__init__()
            self.y = torch.full((48,), -7)

    one, other = _model(), _model()
    for model, data in ((one, Shifted()), (other, Labelless())):
        trainer(tmp_path, [BatchNormAdaptation()]).test(model, _loader(data), verbose=False)
    pairs = zip(_statistics(one.used[0][0]), _statistics(other.used[0][0]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- which data


class Keeps(BatchNormAdaptation):
    """Keeps the batches that it adapted to."""

    def __init__(self, **options):
        super().__init__(forward=self._keep, **options)
        self.seen = []

    def _keep(self, model, batch):
        x = batch[0] if isinstance(batch, list | tuple) else batch
        self.seen.append(x.clone())
        return model(x)


def _same_samples(a, b):
    return torch.equal(a.flatten(1).sum(1).sort().values, b.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(
    ("verb", "limit"), [("test", "limit_test_batches"), ("predict", "limit_predict_batches"), ("test", "fast_dev_run")]
)
def test_only_the_batches_that_are_tested_are_adapted_to(tmp_path, verb, limit):
    keeps, data = Keeps(), Shifted()
    _call(verb, trainer(tmp_path, [keeps], **{limit: 2}), _model(), _loader(data, 5))
    assert _same_samples(torch.cat(keeps.seen), data.x[:10])


def test_sorted_data_are_adapted_to_in_mixed_batches(tmp_path):
    class Sorted(Shifted):
        def __init__(self):
            super().__init__(length=96)
            order = self.y.argsort()
            self.x, self.y = self.x[order], self.y[order]

    keeps, data = Keeps(), Sorted()
    trainer(tmp_path, [keeps]).test(_model(), _loader(data, 32), verbose=False)
    assert _same_samples(torch.cat(keeps.seen), data.x)
    means = torch.stack([batch.mean() for batch in keeps.seen])
    assert means.std() < 0.3 * torch.stack([batch.mean() for batch in data.x.split(32)]).std()


def test_the_live_loader_its_order_and_the_random_stream_are_left_alone(tmp_path):
    def predicted(callbacks):
        seed_everything(5, verbose=False)
        loader = _loader(batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2))

        class Passes(Watched):
            def predict_step(self, batch, batch_idx):
                return batch[0]

        model = Passes()
        out = torch.cat(trainer(tmp_path, callbacks).predict(model, loader))
        return out, torch.get_rng_state(), loader.generator.get_state()

    for without, ours in zip(predicted([]), predicted([BatchNormAdaptation()]), strict=True):
        assert torch.equal(without, ours)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_transfer_hooks_take_part(tmp_path, workers):
    class Hooked(Watched):
        stages = ()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.stages += ((self.trainer.testing, dataloader_idx),)
            return [batch[0] * 2, batch[1]]

    model = Hooked()
    model.load_state_dict(_model().state_dict())
    data = Shifted()
    expected = _target(model, data.x * 2)
    loaders = [_loader(data, num_workers=workers, persistent_workers=workers > 0) for _ in range(2)]
    trainer(tmp_path, [BatchNormAdaptation(consistency="population")]).test(model, loaders, verbose=False)
    _assert_used(model, 1, expected)
    assert set(model.stages) == {(True, 0), (True, 1)}


def test_a_prediction_writer_gets_the_same_indices(tmp_path):
    class Writer(BasePredictionWriter):
        indices = ()

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            self.indices = batch_indices

    writer, keeps = Writer("epoch"), Keeps()
    trainer(tmp_path, [writer, keeps]).predict(_model(), _loader(batch_size=20))
    assert writer.indices == [[list(range(20)), list(range(20, 40)), list(range(40, 48))]]
    assert _same_samples(torch.cat(keeps.seen), Shifted().x)


def test_a_chosen_subset_by_a_sampler_is_followed(tmp_path):
    keeps, data = Keeps(), Shifted()
    chosen = [3, 5, 7, 11, 13, 17, 19, 23]
    trainer(tmp_path, [keeps]).test(_model(), _loader(data, 4, sampler=chosen), verbose=False)
    assert _same_samples(torch.cat(keeps.seen), data.x[chosen])


def test_a_sampler_in_order_that_stops_early_is_followed(tmp_path):
    keeps, data = Keeps(), Shifted()
    first = SequentialSampler(range(20))
    trainer(tmp_path, [keeps]).test(_model(), _loader(data, 16, sampler=first), verbose=False)
    assert _same_samples(torch.cat(keeps.seen), data.x[:20])


@pytest.mark.parametrize("callback", [BatchNormAdaptation, BatchNormRecalibration])
@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: WeightedRandomSampler([1.0] * len(data), 30),
        lambda data: SubsetRandomSampler(range(30)),
        lambda data: RandomSampler(data, replacement=True),
    ],
    ids=["weighted", "subset", "replacement"],
)
def test_samplers_that_draw_from_the_global_generator_leave_it_alone(tmp_path, sampler, callback):
    drawn = []
    for callbacks in ([], [callback()]):
        model, data = _model(), Shifted()
        loader = _loader(data, sampler=sampler(data))
        engine = trainer(tmp_path, callbacks, max_epochs=1)
        seed_everything(7, verbose=False)
        if callback is BatchNormAdaptation:
            engine.test(model, loader, verbose=False)
        else:
            engine.fit(model, loader, _loader(data))
        drawn.append((torch.get_rng_state(), weights(model)))
    (plain_state, plain), (state, ours) = drawn
    assert torch.equal(plain_state, state)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


class _Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


def test_a_stream_that_can_be_read_again_is_adapted_to(tmp_path):
    model, data = _model(), Shifted()
    expected = _target(model, data.x)
    callback = BatchNormAdaptation(consistency="population")
    trainer(tmp_path, [callback]).test(model, _loader(_Stream(data)), verbose=False)
    _assert_used(model, 0, expected)
    assert len(model.used[0]) == 3


def test_a_stream_that_can_be_read_once_is_refused_with_what_to_do(tmp_path):
    class Once(_Stream):
        def __init__(self, data):
            self.rest = (data[index] for index in range(len(data)))

        def __iter__(self):
            return self.rest

    with pytest.raises(MisconfigurationException, match=r"data set of the test loader .* read twice.*recalibrate"):
        trainer(tmp_path, [BatchNormAdaptation()]).test(_model(), _loader(Once(Shifted())), verbose=False)


def test_data_that_come_in_no_loader_are_refused_and_a_list_of_batches_in_one_is_not(tmp_path):
    class Batches:
        def __iter__(self):
            return iter(batches)

    data = Shifted()
    batches = list(_loader(data))
    with pytest.raises(MisconfigurationException, match=r"prediction data is a Batches.*batch_size=None"):
        trainer(tmp_path, [BatchNormAdaptation()]).predict(_model(), Batches())
    keeps = Keeps()
    trainer(tmp_path, [keeps]).predict(_model(), DataLoader(batches, batch_size=None))
    assert _same_samples(torch.cat(keeps.seen), data.x)


def test_a_step_that_takes_the_iterator_is_served_with_one_loader_and_refused_with_several(tmp_path):
    class Iterates(Watched):
        def test_step(self, dataloader_iter):
            batch, batch_idx, index = next(dataloader_iter)
            return super().test_step(batch, batch_idx, index)

    model = Iterates()
    model.load_state_dict(_model().state_dict())
    expected = _target(model, Shifted().x)
    trainer(tmp_path, [BatchNormAdaptation(consistency="population")]).test(model, _loader(), verbose=False)
    _assert_used(model, 0, expected)
    with pytest.raises(MisconfigurationException, match="takes dataloader_iter"):
        trainer(tmp_path, [BatchNormAdaptation()]).test(model, [_loader(), _loader()], verbose=False)


# --- the model comes back


class _Breaks(Watched):
    def __init__(self, error, at):
        super().__init__()
        self.error, self.at = error, at

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch, batch_idx, dataloader_idx)
        if (dataloader_idx, batch_idx) == self.at:
            raise self.error


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_the_model_comes_back_after_an_exception_and_ctrl_c(tmp_path, error, at):
    handler = signal.getsignal(signal.SIGINT)
    model = _Breaks(error, at)
    model.load_state_dict(_model().state_dict())
    tensors = _state(model)["tensors"]
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            trainer(tmp_path, [BatchNormAdaptation()]).test(model, [_loader(), _loader()], verbose=False)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning turns Ctrl-C off while it ends
    source = [tensors[f"net.{bn}.running_mean"][2] for bn in ("bn1", "bn2")]
    assert not torch.equal(model.used[at[0]][-1]["bn1.running_mean"], source[0]), "it was adapted when it broke"
    after = _state(model)["tensors"]
    assert all(torch.equal(after[name][2], value) for name, (_, _, value) in tensors.items())


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_the_model_comes_back_where_the_pass_itself_breaks(tmp_path, error):
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 5:  # in the pass over the second loader
            raise error
        return model(batch[0])

    handler = signal.getsignal(signal.SIGINT)
    model = _model()
    tensors = _state(model)["tensors"]
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            trainer(tmp_path, [BatchNormAdaptation(forward=forward)]).test(model, [_loader(), _loader()], verbose=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    after = _state(model)["tensors"]
    assert all(torch.equal(after[name][2], value) for name, (_, _, value) in tensors.items())


def test_a_model_that_was_adapted_can_be_trained(tmp_path):
    model = _model()
    engine = trainer(tmp_path, [BatchNormAdaptation()], max_epochs=1)
    engine.test(model, _loader(), verbose=False)
    engine.fit(model, loader())
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_other_callbacks_and_the_module_find_the_source_statistics_when_the_epoch_ends(tmp_path):
    class Looks(Callback):
        seen = ()

        def on_test_epoch_end(self, trainer, pl_module):
            self.seen += (pl_module.net.bn1.running_mean.clone(),)

    looks, model = Looks(), _model()
    source = model.net.bn1.running_mean.clone()
    trainer(tmp_path, [looks, BatchNormAdaptation()]).test(model, _loader(), verbose=False)
    assert torch.equal(looks.seen[0], source)


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_that_are_averaged_and_swapped_for_a_validation_come_back_too(tmp_path, ours_first):
    averaging, ours = EMAWeightAveraging(decay=0.8), BatchNormAdaptation(consistency="population")
    engine = trainer(tmp_path, [ours, averaging] if ours_first else [averaging, ours], max_epochs=1)
    model = _model()
    engine.fit(model, loader(), loader())
    with torch.no_grad():
        model.net.conv1.weight.mul_(2)  # what the callback swaps in must differ from what it swaps out
    averages = {name: value.clone() for name, value in averaging._average_model.module.state_dict().items()}
    before = _state(model)
    swapped = copy.deepcopy(averaging._average_model.module)
    model.used = {}
    engine.validate(model, _loader(), verbose=False)
    _assert_used(model, 0, _target(swapped, Shifted().x))
    _assert_as_before(model, before)
    after = averaging._average_model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in averages.items())


# --- fit is left alone


def test_fit_and_its_validations_are_bit_identical_to_those_without(tmp_path):
    def fitted(callbacks):
        seed_everything(7, verbose=False)
        model = Classifier(dropout=0.3)
        trainer(tmp_path, callbacks).fit(model, loader(), loader(shuffle=False))
        return model, torch.get_rng_state()

    (plain, plain_rng), (ours, ours_rng) = fitted([]), fitted([BatchNormAdaptation()])
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True))
    for a, b in zip(plain.validated, ours.validated, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(plain_rng, ours_rng)


def test_it_works_beside_the_other_callbacks_from_fit_to_test(tmp_path):
    def run_all(*extra):
        seed_everything(7, verbose=False)
        callbacks = [BatchNormRecalibration(), ActivationShiftMonitor(report=False), BatchNormSwap(norms.Ghost(2))]
        engine = trainer(tmp_path, [*callbacks, *extra, ModelCheckpoint(tmp_path)])
        model = Watched()
        engine.fit(model, loader(), loader(shuffle=False))
        state, model.used = copy.deepcopy(model.state_dict()), {}
        engine.test(model, _loader(), verbose=False)
        return model, state

    plain, expected = run_all()
    ours, state = run_all(BatchNormAdaptation(consistency="population"))
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    _assert_used(ours, 0, _target(ours, Shifted().x))
    assert not torch.allclose(plain.used[0][0]["bn1.running_mean"], ours.used[0][0]["bn1.running_mean"])


def test_averaged_weights_of_a_checkpoint_are_adapted(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, [EMAWeightAveraging(decay=0.8), checkpoint], max_epochs=1).fit(_model(), loader())
    averaged = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    model, reference = Watched(), Watched()
    reference.load_state_dict(averaged)
    callback = BatchNormAdaptation(consistency="population")
    trainer(tmp_path, [callback]).test(model, _loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
    _assert_used(model, 0, _target(reference, Shifted().x))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in averaged.items())


# --- variants


@pytest.mark.parametrize("spec", [norms.Ghost(4), norms.Sync(), norms.Renorm(), norms.MovingAverage()])
def test_a_variants_statistics_are_adapted_and_come_back(tmp_path, spec):
    model = _model()
    bnkit.swap(model, spec)
    before = _state(model)
    callback = BatchNormAdaptation()
    trainer(tmp_path, [callback]).test(model, _loader(), verbose=False)
    assert set(callback.reports[0].layers) == {"net.bn1", "net.bn2"}
    assert not torch.equal(model.used[0][0]["bn1.running_var"], before["tensors"]["net.bn1.running_var"][2])
    _assert_as_before(model, before)


def test_of_domains_the_one_in_use_is_adapted_and_the_others_are_left(tmp_path):
    model = _model()
    bnkit.swap(model, norms.Domain(["day", "night"]))
    before = _state(model)
    with norms.domain(model, "night"):
        trainer(tmp_path, [BatchNormAdaptation()]).test(model, _loader(), verbose=False)
    [day, night] = (model.used[0][0][f"bn1.running_mean{end}"] for end in ("", "_night"))
    assert torch.equal(day, before["tensors"]["net.bn1.running_mean"][2])
    assert not torch.equal(night, day)
    _assert_as_before(model, before)


def test_frozen_layers_are_kept_and_named(tmp_path):
    model = _model()
    bnkit.swap(model, {"net.bn1": norms.Frozen()})
    callback = BatchNormAdaptation()
    trainer(tmp_path, [callback]).test(model, _loader(), verbose=False)
    assert callback.reports[0].kept == {"net.bn1": "frozen"}
    assert set(callback.reports[0].layers) == {"net.bn2"}


@pytest.mark.parametrize("how", ["no layers", "group"])
def test_a_model_with_nothing_to_adapt_is_told_so_and_tested(tmp_path, how):
    model = _model()
    if how == "group":
        bnkit.swap(model, norms.Group(2))
    else:
        model.net.bn1, model.net.bn2 = nn.Identity(), nn.Identity()
    callback = BatchNormAdaptation()
    with pytest.warns(UserWarning, match="nothing to do: Watched"):
        trainer(tmp_path, [callback]).test(model, _loader(), verbose=False)
    assert callback.reports == {}
    assert len(model.used[0]) == 3


# --- logging, options, refusals


def test_it_logs_each_loaders_shift(tmp_path):
    logger, callback = CSVLogger(tmp_path, name="", version=""), BatchNormAdaptation()
    engine = trainer(tmp_path, [callback], logger=logger)
    results = engine.test(_model(), [_loader(), _loader(Images())], verbose=False)
    for index, report in callback.reports.items():
        values = results[index]
        assert values[f"bn/adaptation_shift_median/dataloader_idx_{index}"] == pytest.approx(report.median_shift)
        assert values[f"bn/adaptation_shift_worst/dataloader_idx_{index}"] == pytest.approx(report.worst.shift)
        assert values[f"bn/adaptation_samples/dataloader_idx_{index}"] == 48
    assert "bn/adaptation_shift_median/dataloader_idx_1" in (tmp_path / "metrics.csv").read_text()


def test_a_call_forgets_the_reports_of_the_one_before(tmp_path):
    callback = BatchNormAdaptation()
    engine = trainer(tmp_path, [callback])
    engine.test(_model(), [_loader(), _loader()], verbose=False)
    engine.predict(_model(), _loader())
    assert list(callback.reports) == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_samples": -1}, "prior_samples"),
        ({"max_samples": 0}, "max_samples"),
        ({"tolerance": 0}, "tolerance"),
        ({"consistency": "x"}, "consistency"),
        ({"on_nonfinite": "x"}, "on_nonfinite"),
        ({"dataloaders": "rain"}, r"such as \['rain'\]"),
    ],
)
def test_an_argument_out_of_range_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNormAdaptation(**options)


def test_what_cannot_work_is_refused_at_setup(tmp_path):
    callback = BatchNormAdaptation()
    engine = trainer(tmp_path, [callback])
    engine.strategy.__class__ = type("Fake", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="sharded"):
        callback.setup(engine, Watched(), "test")
    callback.setup(engine, Watched(), "fit")  # where it has nothing to do
    with pytest.raises(MisconfigurationException, match="two BatchNormAdaptation callbacks"):
        trainer(tmp_path, [BatchNormAdaptation(), BatchNormAdaptation()]).test(_model(), _loader(), verbose=False)


def test_a_batch_that_is_not_finite_is_named_and_skipped_on_request(tmp_path):
    data = Shifted()
    data.x[7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"net\.bn1"):
        trainer(tmp_path, [BatchNormAdaptation()]).test(_model(), _loader(data), verbose=False)
    callback = BatchNormAdaptation(on_nonfinite="skip")
    trainer(tmp_path, [callback]).test(_model(), _loader(data), verbose=False)
    assert callback.reports[0].skipped == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_the_pass_runs_in_the_trainers_precision(tmp_path, precision):
    dtypes, model = set(), _model()
    model.net.bn1.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    callback = BatchNormAdaptation()
    trainer(tmp_path, [callback], precision=precision).predict(model, _loader())
    assert dtypes == {torch.float64 if precision == "64-true" else torch.bfloat16}
    assert callback.reports[0].samples == 48


# --- several processes


def _on_ranks(rank, world_size, folder, verb, spec, length):
    model = _model()
    if spec is not None:
        bnkit.swap(model, spec)
    before = _state(model)
    callback = BatchNormAdaptation(consistency="population", prior_samples=5)
    engine = trainer(folder, [callback], devices=world_size, num_nodes=1, strategy=_joined(rank))
    _call(verb, engine, model, [_loader(Shifted(length=length), 5), _loader(Images())])
    _assert_as_before(model, before)
    return {index: _statistics(states[0]) for index, states in model.used.items()}, callback.reports[0].samples


def _joined(rank):
    """DDP in a process group that is there already, one process a rank."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    class Here(LightningEnvironment):
        creates_processes_externally = True

        def world_size(self):
            return 2

        def global_rank(self):
            return rank

        def local_rank(self):
            return rank

    return DDPStrategy(cluster_environment=Here(), process_group_backend="gloo")


@pytest.mark.ddp
@pytest.mark.parametrize("verb", ["test", "predict"])
@pytest.mark.parametrize("spec", [None, norms.Sync()])
def test_all_ranks_get_the_statistics_of_one_process(tmp_path, verb, spec):
    length = 47  # uneven: a test repeats a sample on the second rank, the adaptation does not
    ranks = run(_on_ranks, 2, tmp_path, verb, spec, length)
    for result in ranks:
        assert not isinstance(result, BaseException), result
    (first, samples), (second, _) = ranks
    assert samples == length
    for index, data in ((0, Shifted(length=length)), (1, Images())):
        assert all(torch.equal(a, b) for a, b in zip(first[index], second[index], strict=True))
        torch.testing.assert_close(first[index], _target(_model(), data.x, prior=5), rtol=1e-4, atol=1e-5)


def _with_empty_ranks(rank, world_size, folder):
    model = _model()
    model.allow_zero_length_dataloader_with_multiple_devices = True
    engine = trainer(folder, [BatchNormAdaptation()], devices=world_size, strategy=_joined(rank))
    engine.test(model, _loader(), verbose=False)


@pytest.mark.ddp
def test_ranks_without_batches_are_refused_before_the_others_wait(tmp_path):
    for result in run(_with_empty_ranks, 2, tmp_path):
        assert isinstance(result, MisconfigurationException)
        assert "allow_zero_length_dataloader_with_multiple_devices" in str(result)
