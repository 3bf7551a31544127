"""Many ranks (real processes, gloo) get what one process gets from all the data."""

import contextlib
import io
import time

import pytest
import torch
from helpers.processes import run
from helpers.references import ConvNet, assert_same, inputs, population, snapshot
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnkit
from bnkit import Moments, norms

pytestmark = pytest.mark.ddp


def _shard(data, sizes, rank):
    start = sum(sizes[:rank])
    return data[start : start + sizes[rank]]


def _model():
    torch.manual_seed(1)
    return nn.Sequential(nn.BatchNorm1d(4).double())


def _data(batches=12):
    torch.manual_seed(2)
    return list(torch.randn(batches, 8, 4, dtype=torch.float64) * 0.1 + torch.arange(batches).view(-1, 1, 1) + 1e3)


def _recalibrate(rank, world_size, sizes, options):
    model = _model()
    report = bnkit.recalibrate(model, _shard(_data(), sizes, rank), max_samples=None, **options)
    return model.state_dict(), report.samples, report.batches, report.layers["0"].standard_error


@pytest.mark.parametrize("sizes", [(6, 6), (11, 1), (0, 12), (3, 0, 8, 1)])
def test_uneven_and_empty_shards_give_the_statistics_of_all_data(sizes):
    results = run(_recalibrate, len(sizes), sizes, {})
    model, data = _model(), _data()
    alone = bnkit.recalibrate(model, data, max_samples=None)
    mean, var = population(torch.cat(data))
    for state, samples, batches, error in results:
        assert all(torch.equal(state[name], results[0][0][name]) for name in state), "the same bits on every rank"
        torch.testing.assert_close(state["0.running_mean"], mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(state["0.running_var"], var, rtol=1e-10, atol=0)
        torch.testing.assert_close(error, alone.layers["0"].standard_error, rtol=1e-9, atol=0)
        assert (samples, batches) == (96, 12)


def test_population_consistency_on_two_ranks_with_an_empty_one():
    results = run(_population, 2)
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in results), strict=True))
    torch.manual_seed(0)
    alone = _mlp()
    bnkit.recalibrate(alone, _vectors(), consistency="population")
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-10, atol=1e-12)


def _mlp():
    layers = [module for _ in range(3) for module in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())]
    return nn.Sequential(*layers).double()


def _vectors():
    return list(torch.randn(10, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))


def _population(rank, world_size):
    torch.manual_seed(0)
    model = _mlp()
    bnkit.recalibrate(model, _vectors() if rank == 1 else [], consistency="population")
    return model.state_dict()


def _tolerant(rank, world_size):
    torch.manual_seed(rank)
    model, data, used = _model(), torch.randn(200, 32, 4, dtype=torch.float64), []
    model.register_forward_pre_hook(lambda *_: used.append(1))
    report = bnkit.recalibrate(model, data, tolerance=0.02, max_samples=None)
    return len(used), report.samples, model.state_dict()


def test_with_a_tolerance_all_ranks_stop_at_the_same_batch():
    (used, samples, state), (other_used, other_samples, other_state) = run(_tolerant, 2)
    assert used == other_used < 200
    assert samples == other_samples == 2 * 32 * used
    assert 1250 < samples < 5000
    assert torch.equal(state["0.running_var"], other_state["0.running_var"])


def _capped(rank, world_size):
    return bnkit.recalibrate(_model(), _shard(_data(), (8, 4), rank), max_samples=40).samples


def test_max_samples_is_over_all_ranks():
    assert run(_capped, 2) == [32, 32]


def _wrapped(rank, world_size):
    model = ConvNet()
    wrapped = DistributedDataParallel(model)
    # Uneven shards through the wrapper's own forward would wait for a broadcast that never comes.
    report = bnkit.recalibrate(wrapped, inputs(batches=2 + rank))
    return list(report.layers), report.batches


def test_a_model_in_distributed_data_parallel_is_looked_through():
    assert run(_wrapped, 2) == [(["bn1", "bn2"], 5)] * 2


def _synchronized(rank, world_size, batches):
    model, data = _sync_net(), _images()
    mine = [batch[rank::world_size] for batch in data][: batches[rank]]
    bnkit.recalibrate(model, mine)
    return model.state_dict()


def _sync_net():
    torch.manual_seed(0)
    model = ConvNet().double()
    for layer in (model.bn1, model.bn2):
        norms.Sync().apply(layer)
    return model


def _images():
    return list(torch.randn(4, 6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def test_a_synchronized_layer_keeps_the_ranks_in_step_and_is_counted_once():
    # Rank 1 runs out after two batches: a third forward of rank 0 would wait for it for ever.
    results = run(_synchronized, 2, (3, 2))
    alone = _sync_net()
    bnkit.recalibrate(alone, _images()[:2])
    for state in results:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12)


class _NoIterator:
    def __iter__(self):
        raise OSError("no workers")


class _Unmeasurable(dict):
    def values(self):
        raise OSError("no values")


def _failing(rank, world_size, where):
    torch.manual_seed(0)
    model, data = ConvNet(), inputs(batches=4)
    options = {}
    if rank == 1:
        if where == "loader":
            data = iter([*data[:2], None])
        elif where == "nan":
            data[2][0] = torch.nan
        elif where == "model":
            data[2] = torch.randn(2, 9, 8, 8)
        elif where == "iter":
            data = _NoIterator()
        elif where == "odd batch":
            data[2] = _Unmeasurable()
        elif where == "no layers":
            model.bn1, model.bn2 = nn.Identity(), nn.Identity()
        elif where == "layers":
            model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    before = snapshot(model)
    started = time.monotonic()
    try:
        bnkit.recalibrate(model, data, tolerance=1e-6, **options)
    except Exception as error:
        outcome = error
    assert_same(before, snapshot(model))
    assert time.monotonic() - started < 30
    return type(outcome).__name__, str(outcome)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("loader", "TypeError"),
        ("nan", "FloatingPointError"),
        ("model", "RuntimeError"),
        ("iter", "OSError"),
        ("odd batch", "OSError"),
        ("no layers", "ValueError"),
    ],
)
def test_a_rank_that_fails_stops_all_and_changes_none(where, error):
    results = run(_failing, 2, where)
    assert results[1][0] == error
    assert results[0][0] == "RuntimeError"
    assert "rank 1" in results[0][1]


def test_models_that_differ_over_ranks_are_named_by_layer():
    for kind, message in run(_failing, 2, "layers"):
        assert kind == "ValueError"
        assert "bn2" in message


def _prior(rank, world_size):
    model = _model()
    model[0].running_mean.fill_(rank)
    bnkit.recalibrate(model, _shard(_data(), (6, 6), rank), prior_samples=100)
    return model[0].running_mean, model[0].running_var


def test_the_prior_is_rank_0s_as_in_ddp():
    first, second = run(_prior, 2)
    assert torch.equal(first[0], second[0])
    mean, _ = population(torch.cat(_data()))
    torch.testing.assert_close(first[0], mean * 96 / 196)


def _bar(rank, world_size):
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured):
        bnkit.recalibrate(_model(), _shard(_data(), (6, 6), rank), progress=True)
    return captured.getvalue()


def test_the_progress_bar_is_rank_0s_alone():
    first, second = run(_bar, 2)
    assert "Recalibrating" in first
    assert not second


def _outsider(rank, world_size):
    group = torch.distributed.new_group([0])
    try:
        bnkit.recalibrate(_model(), _data(), process_group=group)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_outside_the_process_group_is_told_so():
    inside, outside = run(_outsider, 2)
    assert not inside
    assert "not in the process group" in outside


def _reduce(rank, world_size):
    parts = [Moments.of(torch.randn(5, 3) + 1), Moments.empty(3), Moments.of(torch.randn(1, 3, 40))]
    mine = parts[rank]
    total = mine.all_reduce()
    sizes = [2, 3]
    cat = Moments.cat([Moments.of(torch.randn(4, 2)), mine]).all_reduce().split(sizes)[1]
    return mine._packed(), total._packed(), cat._packed()


def test_moments_reduce_over_ranks_to_the_same_bits():
    results = run(_reduce, 3)
    pooled = Moments.pool([Moments(*mine[:, :]) for mine, _, _ in results])
    for _, total, cat in results:
        assert torch.equal(total, results[0][1])
        torch.testing.assert_close(total, pooled._packed(), rtol=1e-14, atol=0)
        torch.testing.assert_close(cat, total, rtol=1e-14, atol=0)


def _subgroup(rank, world_size):
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2])]
    group = groups[0] if rank < 2 else groups[1]
    model = _model()
    report = bnkit.recalibrate(model, _data()[rank * 4 : rank * 4 + 4], process_group=group)
    return report.samples, model[0].running_mean


def test_a_process_group_shares_among_its_own_ranks():
    results = run(_subgroup, 3)
    assert [samples for samples, _ in results] == [64, 64, 32]
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[2][1], population(torch.cat(_data()[8:]))[0])
