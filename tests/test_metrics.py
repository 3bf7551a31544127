import copy
import math
import pickle

import pytest
import torch
from helpers.processes import run
from torchmetrics import MetricCollection

from bnkit import Moments, metrics
from bnkit import shift as measures
from bnkit.metrics import (
    AffineMagnitude,
    AllFinite,
    BatchNoise,
    DeadChannels,
    InternalCovariateShift,
    KLDivergence,
    LogVarianceRatio,
    MeanShift,
    PopulationStabilityIndex,
    TrainEvalGap,
    Wasserstein2,
)
from bnkit.probes import CovariateShift, GapReport

C = 3
# Of two Moments, and the function that each is.
COMPARISONS = {
    MeanShift: measures.mean_shift,
    LogVarianceRatio: measures.log_variance_ratio,
    KLDivergence: measures.kl_divergence,
    PopulationStabilityIndex: measures.psi,
    Wasserstein2: lambda observed, reference, eps=0: measures.wasserstein2(observed, reference),
}
POOLED = {
    **COMPARISONS,
    DeadChannels: None,
    BatchNoise: measures.batch_noise,
}


def batches(number=6, size=5):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size + i, C, generator=generator).double() * (1 + i) + i for i in range(number)]


def reference(offset=0.0):
    return Moments(1, torch.arange(C).double() + offset, torch.ones(C) * 2)


def arguments(kind, x):
    if kind in COMPARISONS:
        return (Moments.of(x), reference())
    if kind is DeadChannels:
        return (Moments.of(x), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, -99.0]))
    return (Moments.of(x),)


def updated(kind, data=None):
    metric = kind(C)
    for x in batches() if data is None else data:
        metric.update(*arguments(kind, x))
    return metric


def test_every_metric_of_the_module_is_public_and_has_an_example():
    for name in metrics.__all__:
        assert ">>> metric" in getattr(metrics, name).__doc__, name


@pytest.mark.parametrize("kind", COMPARISONS)
def test_updates_are_pooled_as_if_all_had_been_one_batch(kind):
    metric = updated(kind)
    expected = COMPARISONS[kind](Moments.of(torch.cat(batches())), reference(), 1e-5)
    assert metric.compute().dtype == torch.float64
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_eps_is_the_layers(kind):
    metric = kind(C, eps=0.5)
    metric.update(Moments.of(batches()[1]), reference())
    expected = COMPARISONS[kind](Moments.of(batches()[1]), reference(), 0.5)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)


def test_a_standardized_distance_is_in_the_references_standard_deviations():
    metric = Wasserstein2(C, eps=0.5, standardized=True)
    metric.update(Moments.of(batches()[1]), reference())
    assert metric.compute().equal(measures.shift(Moments.of(batches()[1]), reference(), 0.5).wasserstein2)


def test_the_last_reference_counts_and_an_empty_one_does_not():
    metric = MeanShift(C)
    x = Moments.of(batches()[0])
    metric.update(x, reference())
    metric.update(x, reference(5.0))
    metric.update(x, Moments.empty(C))
    torch.testing.assert_close(metric.compute(), measures.mean_shift(x, reference(5.0)))


def test_calling_a_metric_gives_the_batchs_value_and_keeps_the_pooled_one():
    metric = MeanShift(C)
    for i, x in enumerate(batches()):
        value = metric(Moments.of(x), reference(i))
        torch.testing.assert_close(value, measures.mean_shift(Moments.of(x), reference(i)))
    expected = measures.mean_shift(Moments.of(torch.cat(batches())), reference(len(batches()) - 1))
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)


def test_batch_noise_keeps_what_lies_between_the_batches():
    expected = measures.batch_noise(Moments.pool([Moments.of(x) for x in batches()]))
    torch.testing.assert_close(updated(BatchNoise).compute(), expected, rtol=1e-12, atol=0)
    assert updated(BatchNoise, batches(1)).compute().isposinf().all()


def test_dead_channels_are_ones_and_their_mean_is_the_fraction():
    assert updated(DeadChannels).compute().tolist() == [0, 1, 1]
    metric = DeadChannels(C)
    metric.update(Moments(4, torch.zeros(C), torch.tensor([0.0, 1.0, math.nan])))
    value = metric.compute()
    assert value[:2].tolist() == [1, 0]
    assert value[2].isnan()


def test_one_update_that_is_not_finite_is_remembered():
    metric = AllFinite()
    metric.update(Moments.of(batches()[0]))
    metric.update(Moments.empty(9))
    assert metric.compute() == 1
    metric.update(Moments(4, torch.ones(2), torch.tensor([1.0, math.inf])))
    metric.update(Moments.of(batches()[0]))
    assert metric.compute() == 0


def test_affine_magnitudes_are_the_last_ones():
    metric = AffineMagnitude()
    metric.update(torch.ones(4) * 9, torch.ones(4))
    metric.update(torch.tensor([3.0, -4.0]), None)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "weight": pytest.approx(math.sqrt(12.5)),
        "bias": 0.0,
    }


def report(loss, samples, disagreement=None):
    return GapReport(loss, 1.0, 1.0 + loss, disagreement, 0.5, samples, {})


def test_a_gap_is_averaged_over_the_samples_that_know_it():
    metric = TrainEvalGap()
    metric.update(report(1.0, 10, 0.25))
    metric.update(report(4.0, 20))
    metric.update(report(0.0, 5), samples=0)
    value = metric.compute()
    assert value["loss"] == pytest.approx(3.0)
    assert value["loss_running"] == pytest.approx(4.0)
    assert value["disagreement"] == 0.25
    assert value["output"] == 0.5
    metric.reset()
    metric.update(GapReport(None, None, None, None, None, 8, {}))
    assert all(value.isnan() for value in metric.compute().values())


def test_covariate_shifts_are_averaged_over_the_probes_of_each_layer():
    metric = InternalCovariateShift(["a", "b", "c"])
    metric.update({"b": CovariateShift(1.0, 0.5), "a": CovariateShift(0.0, math.nan)})
    metric.update({"b": CovariateShift(3.0, 1.0), "a": CovariateShift(2.0, 1.0)})
    norm, cosine = metric.compute()["norm"], metric.compute()["cosine"]
    assert norm[:2].tolist() == [1.0, 2.0]
    assert cosine[:2].tolist() == [1.0, 0.75]
    assert norm[2].isnan()
    assert cosine[2].isnan()


EVERY = {
    **{kind: lambda kind=kind: updated(kind) for kind in POOLED},
    AllFinite: lambda: filled(AllFinite(), Moments.of(batches()[0])),
    AffineMagnitude: lambda: filled(AffineMagnitude(), torch.ones(2) * 1.1, torch.ones(2) * 0.3),
    TrainEvalGap: lambda: filled(TrainEvalGap(), report(0.1, 7, 0.3)),
    InternalCovariateShift: lambda: filled(
        InternalCovariateShift(["a", "b"]), {"a": CovariateShift(0.1, 0.3), "b": CovariateShift(0.7, 0.9)}
    ),
}


def filled(metric, *args):
    metric.update(*args)
    return metric


def numbers(metric):
    value = metric.compute()
    return torch.cat([v.flatten() for v in value.values()]) if isinstance(value, dict) else value.flatten()


def same(one, other):
    return one.dtype == other.dtype == torch.float64 and torch.equal(one, other) and not one.isnan().any()


@pytest.mark.parametrize("kind", EVERY)
def test_before_any_update_and_after_a_reset_nothing_is_known(kind):
    metric = EVERY[kind]()
    assert not numbers(metric).isnan().any()
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert numbers(metric).isnan().all()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: torch.nn.ModuleList([m]).to(torch.float16)[0],
    ],
    ids=["pickle", "deepcopy", "half", "float", "to half", "to a device in half", "set_dtype", "in a module"],
)
def test_no_move_and_no_cast_costs_a_state_its_digits(kind, change):
    expected = numbers(EVERY[kind]())
    assert same(numbers(change(EVERY[kind]())), expected)
    computed = EVERY[kind]()
    computed.compute()  # and remembers the result
    assert same(numbers(change(computed)), expected)
    moved = change(EVERY[kind]())
    moved.reset()
    assert all(getattr(moved, name).dtype == torch.float64 for name in moved._defaults)


def test_a_state_dict_resumes_a_persistent_metric():
    one, other = updated(BatchNoise, batches()[:3]), BatchNoise(C)
    for metric in (one, other):
        metric.persistent(True)
    other.load_state_dict(one.state_dict())
    for x in batches()[3:]:
        other.update(Moments.of(x))
    torch.testing.assert_close(other.compute(), updated(BatchNoise).compute(), rtol=1e-12, atol=0)


def test_a_collection_gives_each_metric_what_it_takes_and_shares_the_states():
    collection = MetricCollection([kind(C) for kind in POOLED])
    weight, bias = arguments(DeadChannels, batches()[0])[1:]
    for x in batches():
        collection.update(observed=Moments.of(x), reference=reference(), weight=weight, bias=bias)
    found = collection.compute()
    for kind in POOLED:
        torch.testing.assert_close(found[kind.__name__], updated(kind).compute(), rtol=1e-12, atol=1e-12)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 1, len(COMPARISONS)]


def test_metrics_of_one_compute_group_keep_their_own_eps():
    collection = MetricCollection({"small": MeanShift(C, eps=0), "large": MeanShift(C, eps=2.0)})
    for x in batches():
        collection.update(Moments.of(x), reference())
    assert len(collection.compute_groups) == 1
    found = collection.compute()
    torch.testing.assert_close(found["small"], found["large"] * math.sqrt(2), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_said():
    with pytest.raises(TypeError, match=r"takes bnkit.Moments, not a Tensor"):
        BatchNoise(C).update(torch.randn(4, C))
    with pytest.raises(ValueError, match=r"MeanShift\(num_channels=3\) got Moments of 2 channels"):
        MeanShift(C).update(Moments.empty(C), Moments.empty(2))
    with pytest.raises(ValueError, match="num_channels is the layer's number"):
        MeanShift(0)
    with pytest.raises(ValueError, match="eps is the layer's eps"):
        MeanShift(C, eps=-1.0)
    with pytest.raises(ValueError, match="threshold is a fraction"):
        DeadChannels(C, threshold=0.0)
    with pytest.raises(ValueError, match=r"not for \['z'\]"):
        InternalCovariateShift(["a"]).update({"z": CovariateShift(0.0, 1.0)})
    with pytest.raises(ValueError, match="each once"):
        InternalCovariateShift(["a", "a"])
    with pytest.raises(ValueError, match="samples is a number"):
        TrainEvalGap().update(report(1.0, 1), samples=-1)


def shares(world_size):
    """Each rank's batches: uneven, and of three ranks the first has none."""
    data = batches()
    return {1: [data], 2: [data[:1], data[1:]], 3: [[], data[:4], data[4:]]}[world_size]


def _compute_on_rank(rank, world_size):
    found = {}
    mine = shares(world_size)[rank]
    for kind in POOLED:
        metric = updated(kind, mine)
        found[kind.__name__] = numbers(metric)
        # What was gathered is given back: a rank's state is its own again.
        found[f"{kind.__name__} own"] = metric.observed[0, 0].item()
    noted = MeanShift(C)
    for x in mine:
        noted.update(Moments.of(x), reference(rank))
    found["lowest reference"] = numbers(noted)
    finite, affine, gap, shifts = AllFinite(), AffineMagnitude(), TrainEvalGap(), InternalCovariateShift(["a", "b"])
    for x in mine:
        finite.update(Moments(2, x[0], torch.full((C,), math.nan if len(x) == 10 else 1.0)))
        affine.update(torch.full((2,), 1.0 + rank), None)
        gap.update(report(float(len(x)), len(x), 0.5))
        shifts.update({"a": CovariateShift(float(len(x)), 1.0)})
    return found | {
        "finite": numbers(finite),
        "affine": numbers(affine),
        "gap": numbers(gap),
        "shifts": numbers(shifts),
    }


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_gives_what_one_process_with_all_data_gives(world_size):
    everything = batches()
    lengths = torch.tensor([len(x) for x in everything]).double()
    results = run(_compute_on_rank, world_size)
    for rank, found in enumerate(results):
        for kind in POOLED:
            torch.testing.assert_close(found[kind.__name__], numbers(updated(kind)), rtol=1e-12, atol=1e-12)
            assert found[kind.__name__].equal(results[0][kind.__name__])  # the same bits on all of them
            assert found[f"{kind.__name__} own"] == sum(len(x) for x in shares(world_size)[rank])
        lowest = 1 if world_size == 3 else 0  # rank 0 of three has seen no reference
        expected = measures.mean_shift(Moments.of(torch.cat(everything)), reference(lowest))
        torch.testing.assert_close(found["lowest reference"], expected, rtol=1e-12, atol=1e-12)
        assert found["finite"].tolist() == [0]
        assert found["affine"].tolist() == [1.0 + lowest, 0.0]
        loss = (lengths.square().sum() / lengths.sum()).item()
        assert found["gap"].tolist() == pytest.approx([loss, 1.0, 1 + loss, 0.5, 0.5])
        norm_a, norm_b, cosine_a, cosine_b = found["shifts"].tolist()
        assert (norm_a, cosine_a) == (pytest.approx(lengths.mean().item()), 1.0)
        assert math.isnan(norm_b)
        assert math.isnan(cosine_b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", POOLED)
def test_a_metric_on_a_gpu_takes_moments_from_anywhere(kind):
    metric = kind(C).to("cuda")
    for x in batches():
        metric.update(*(part.to("cuda") for part in arguments(kind, x)))
    metric.update(*arguments(kind, batches()[0]))
    value = metric.compute()
    assert value.device.type == "cuda"
    torch.testing.assert_close(value.cpu(), updated(kind, [*batches(), batches()[0]]).compute())
