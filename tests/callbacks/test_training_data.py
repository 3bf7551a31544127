"""The recalibration's own pass over the training data: which batches it sees, and what it does not disturb."""

import itertools

import pytest
import torch
from helpers.lightning_models import Classifier, Images, loader, trainer, weights
from helpers.references import population
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bnkit.callbacks import BatchNormRecalibration
from bnkit.callbacks.own_loaders import chunks
from bnkit.callbacks.training_data import TrainingData

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


class Keeps(BatchNormRecalibration):
    """Keeps the samples that each recalibration saw."""

    def __init__(self, forward=None, **options):
        self.seen = []
        super().__init__(forward=self._keep, **options)

    def _keep(self, model, batch):
        x = batch[0] if not isinstance(batch, dict) else batch["a"][0]
        self.seen[-1].append(x.clone())
        return model(x)

    def _recalibrate(self, trainer, pl_module):
        self.seen.append([])
        super()._recalibrate(trainer, pl_module)

    def samples(self, index=-1):
        return torch.cat(self.seen[index])


def _fit(folder, callbacks, train, model=None, **options):
    seed_everything(3, verbose=False)
    model = model or Classifier()
    trainer(folder, callbacks, max_epochs=1, **options).fit(model, train, loader(shuffle=False))
    return model


def _same_samples(a, b):
    return torch.equal(a.flatten(1).sum(1).sort().values, b.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once(tmp_path, shuffle):
    keeps = Keeps()
    _fit(tmp_path, [keeps], loader(shuffle=shuffle))
    assert _same_samples(keeps.samples(), Images().x)


def test_max_samples_of_an_ordered_loader_are_a_random_subset_and_the_same_each_time(tmp_path):
    class Ordered(Images):
        def __init__(self):
            super().__init__(200)
            self.x = torch.arange(200.0).view(-1, 1, 1, 1) + torch.randn(200, 2, 8, 8)

    keeps = Keeps(max_samples=40)
    _fit(tmp_path, [keeps], DataLoader(Ordered(), 4), val_check_interval=10)
    assert keeps.samples().mean() > 60, "the first 40 have a mean of 20"
    assert all(torch.equal(keeps.samples(0), keeps.samples(index)) for index in range(len(keeps.seen)))


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"limit_train_batches": 2}, {"fast_dev_run": 2}])
def test_limited_training_recalibrates_from_the_same_few_batches(tmp_path, options):
    keeps = Keeps()
    _fit(tmp_path, [keeps], loader(shuffle=False), **options)
    assert torch.equal(keeps.samples(), Images().x[:8])


def test_a_resumable_sampler_is_not_moved(tmp_path):
    class Resumable(Sampler):
        def __init__(self, data):
            self.data, self.position, self.drawn = data, 0, []

        def __len__(self):
            return len(self.data)

        def __iter__(self):
            for index in range(self.position, len(self.data)):
                self.position = index + 1
                self.drawn.append(index)
                yield index
            self.position = 0

    data = Images()
    sampler = Resumable(data)
    keeps = Keeps(every_n_steps=1)
    _fit(tmp_path, [keeps], DataLoader(data, 4, sampler=sampler), val_check_interval=3)
    assert sampler.drawn == list(range(48))
    assert len(keeps.seen) == 4


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: WeightedRandomSampler([1.0 if label == 2 else 0.0 for label in data.y], 24),
        lambda data: SubsetRandomSampler([i for i in range(len(data)) if data.y[i] == 2]),
    ],
)
def test_a_sampler_that_chooses_is_followed(tmp_path, sampler):
    data = Images()
    keeps = Keeps()
    _fit(tmp_path, [keeps], DataLoader(data, 4, sampler=sampler(data)))
    wanted = {tuple(x.flatten()[:3].tolist()) for x in data.x[data.y == 2]}
    assert {tuple(x.flatten()[:3].tolist()) for x in keeps.samples()} <= wanted


def test_a_batch_sampler_is_followed(tmp_path):
    class ByLength(BatchSampler):
        def __iter__(self):
            yield from ([0, 1, 2], [7, 8])

        def __len__(self):
            return 2

    data = Images()
    keeps = Keeps()
    batch_sampler = ByLength(SequentialSampler(data), 3, False)
    _fit(tmp_path, [keeps], DataLoader(data, batch_sampler=batch_sampler))
    assert [len(batch) for batch in keeps.seen[-1]] == [3, 2]


class Stream(IterableDataset):
    """Counts on itself, so that a second iteration of the same object would be seen."""

    def __init__(self):
        self.data, self.given = Images(), 0

    def __iter__(self):
        for index in range(len(self.data)):
            self.given += 1
            yield self.data[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset(tmp_path, workers):
    stream, keeps = Stream(), Keeps()
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    # With two workers that do not share the work, every sample comes twice, in training as here.
    _fit(tmp_path, [keeps], DataLoader(stream, 4, **options), val_check_interval=4)
    assert stream.given == (0 if workers else 48), "the live object is read by training alone"
    assert _same_samples(keeps.samples().unique(dim=0), Images().x)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_a_combined_loader_keeps_its_structure_and_mode(tmp_path, mode):
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    keeps = Keeps()
    combined = CombinedLoader({"a": loader(), "b": loader(length=16)}, mode)
    _fit(tmp_path, [keeps], combined, model=Two())
    assert len(keeps.seen[-1]) == {"max_size_cycle": 12, "min_size": 4}[mode]


@pytest.mark.parametrize("as_function", [True, False])
def test_another_loader_can_be_given(tmp_path, as_function):
    other = DataLoader(TensorDataset(torch.randn(20, 2, 8, 8) + 9), 5)
    keeps = Keeps(dataloader=(lambda: other) if as_function else other)
    model = _fit(tmp_path, [keeps], loader(), limit_train_batches=1)
    assert _same_samples(keeps.samples(), other.dataset.tensors[0])
    with torch.no_grad():
        mean, _ = population(model.net.conv1(other.dataset.tensors[0]))
    torch.testing.assert_close(model.net.bn1.running_mean.double(), mean, rtol=1e-5, atol=1e-5)


class Batches:
    def __iter__(self):
        data = Images()
        return iter([(data.x[i : i + 6], data.y[i : i + 6]) for i in range(0, 48, 6)])


@pytest.mark.parametrize("given", [Batches(), list(Batches()), Batches])
def test_any_iterable_of_batches_can_be_given(tmp_path, given):
    keeps = Keeps(dataloader=given)
    _fit(tmp_path, [keeps], loader())
    assert torch.equal(keeps.samples(), Images().x)


def test_training_data_that_is_no_loader_is_refused_before_training(tmp_path):
    class Prefetch:
        """Holds a loader whose workers serve one iterator at a time: a second one would end the first."""

        def __init__(self):
            self.loader = loader(num_workers=2, persistent_workers=True)

        def __iter__(self):
            yield from self.loader

    steps = []

    class Steps(Classifier):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"Prefetch, not a DataLoader.*dataloader="):
        _fit(tmp_path, [Keeps()], Prefetch(), model=Steps(), val_check_interval=3)
    assert not steps
    _fit(tmp_path, [Keeps(dataloader=loader())], Prefetch(), model=Steps(), val_check_interval=3)
    assert len(steps) == 12


@pytest.mark.parametrize("weighted", [True, False])
def test_a_plain_batch_sampler_of_the_users(tmp_path, weighted):
    data = Images()
    sampler = WeightedRandomSampler([float(label == 2) for label in data.y], 24) if weighted else RandomSampler(data)
    keeps = Keeps()
    _fit(tmp_path, [keeps], DataLoader(data, batch_sampler=BatchSampler(sampler, 5, False)))
    assert [len(batch) for batch in keeps.seen[-1]][:2] == [5, 5]
    if weighted:
        wanted = {tuple(x.flatten()[:3].tolist()) for x in data.x[data.y == 2]}
        assert {tuple(x.flatten()[:3].tolist()) for x in keeps.samples()} <= wanted
    else:
        assert _same_samples(keeps.samples(), data.x)


def test_what_cannot_be_rebuilt_is_refused_with_the_cure(tmp_path):
    engine = trainer(tmp_path, max_epochs=1)

    class OwnWay(DataLoader):
        def __iter__(self):
            return iter(())

    class Uncopyable(Sampler):
        def __init__(self):
            self.stream = itertools.count()

        def __deepcopy__(self, memo):
            raise TypeError("no copies")

        def __len__(self):
            return 4

        def __iter__(self):
            return itertools.islice(self.stream, 4)

    module = Classifier()
    for live, message in (
        (iter([torch.zeros(1)]), "iterator"),
        (OwnWay(Images(), 4), "OwnWay"),
        (DataLoader(Images(), 4, sampler=Uncopyable()), "Uncopyable.*no copies"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"{message}.*dataloader="):
            list(TrainingData(engine, module, live))


def test_batching_by_the_dataset_itself(tmp_path):
    class Whole(Images):
        def __getitem__(self, index):
            return self.x[index * 6 : index * 6 + 6], self.y[index * 6 : index * 6 + 6]

        def __len__(self):
            return 8

    keeps = Keeps()
    _fit(tmp_path, [keeps], DataLoader(Whole(), batch_size=None, shuffle=True))
    assert _same_samples(keeps.samples(), Images().x)


@pytest.mark.parametrize(
    ("length", "drop_last", "sizes"),
    [(9, False, [4, 5]), (10, False, [4, 4, 2]), (9, True, [4, 4]), (8, True, [4, 4]), (1, False, [1]), (0, False, [])],
)
def test_a_lone_last_sample_joins_the_batch_before(length, drop_last, sizes):
    assert [len(chunk) for chunk in chunks(list(range(length)), 4, drop_last)] == sizes


class SavesPerRank(Classifier):
    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def on_train_end(self):
        keeps = next(callback for callback in self.trainer.callbacks if isinstance(callback, Keeps))
        torch.save((self.state_dict(), self.validated[-1], keeps.samples()), f"{self.folder}/{self.global_rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("given", [True, False])
def test_under_ddp_every_rank_takes_its_share_and_all_get_the_same(tmp_path, given):
    model = SavesPerRank(tmp_path)
    live = loader(length=47, num_workers=0)
    keeps = Keeps(dataloader=live if given else None)
    _fit(tmp_path, [keeps], live, model=model, strategy="ddp_fork", devices=2)
    (state, validated, seen), (other, _, also) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert _same_samples(torch.cat([seen, also]), Images(47).x), "each sample once, over both ranks"
    model.load_state_dict(validated)
    with torch.no_grad():
        mean, var = population(model.net.conv1(Images(47).x))
    torch.testing.assert_close(validated["net.bn1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(validated["net.bn1.running_var"].double(), var, rtol=1e-5, atol=0)


@pytest.mark.ddp
def test_under_ddp_without_a_distributed_sampler_every_rank_has_all_of_its_loader(tmp_path):
    live, keeps = loader(length=12), Keeps()
    _fit(
        tmp_path,
        [keeps],
        live,
        model=SavesPerRank(tmp_path),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    for rank in (0, 1):
        assert _same_samples(torch.load(tmp_path / f"{rank}.pt", weights_only=True)[2], Images(12).x)


@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler])
def test_the_live_samplers_generator_is_not_moved(tmp_path, sampler):
    def run(callbacks):
        data = Images()
        generator = torch.Generator().manual_seed(1)
        chosen = RandomSampler(data, generator=generator) if sampler is RandomSampler else SequentialSampler(data)
        model = _fit(
            tmp_path, callbacks, DataLoader(data, 4, sampler=chosen, generator=generator), val_check_interval=3
        )
        return weights(model), generator.get_state()

    (plain, plain_state), (ours, ours_state) = run([]), run([BatchNormRecalibration()])
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert torch.equal(plain_state, ours_state)
