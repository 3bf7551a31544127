"""One result, however many processes have the same global batch: 1, 2 or 4 on gloo, and two nodes of torchrun."""

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import run
from helpers.references import ConvNet, population
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import bnkit
from bnkit import norms
from bnkit.monitoring import Monitor

pytestmark = pytest.mark.ddp

WORLDS = [1, 2, 4]
STEPS, BATCH = 20, 8


def _network():
    torch.manual_seed(0)
    return ConvNet().double()


def _global_batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 2, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.arange(BATCH) % 3
    # What a rank has is unlike what the others have: batches of its own would give other statistics.
    return x + torch.arange(BATCH).view(-1, 1, 1, 1), y


# ---------------------------------------------------------------- training


def _train(model, rank=0, world_size=1):
    """20 steps on this rank's share; the losses, and what the monitor has seen."""
    inner = bnkit.layers.unwrap(model)
    monitor = Monitor(inner, every_n_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, snapshots = [], []
    for step in range(STEPS):
        x, y = (part.chunk(world_size)[rank] for part in _global_batch(step))
        monitor.before()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        snapshot = monitor.after(step, samples=len(x))
        if snapshot is not None:
            snapshots.append({name: measures._asdict() for name, measures in snapshot.layers.items()})
    return inner.state_dict(), torch.stack(losses), snapshots


def _synchronized(rank, world_size):
    model = _network()
    bnkit.swap(model, norms.Sync())
    return _train(DistributedDataParallel(model), rank, world_size)


@pytest.fixture(scope="module")
def alone():
    """Plain torch.nn.BatchNorm on the global batch, in this process."""
    return _train(_network())


@pytest.fixture(scope="module", params=WORLDS)
def together(request):
    return run(_synchronized, request.param)


def test_synchronized_training_ends_with_the_weights_statistics_and_losses_of_one_process(alone, together):
    for state, _, _ in together:
        for name, value in alone[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)
    losses = torch.stack([losses for _, losses, _ in together])
    torch.testing.assert_close(losses.mean(0), alone[1], rtol=1e-6, atol=1e-6)


def test_the_ranks_of_synchronized_training_end_bit_identical(together):
    for state, _, _ in together[1:]:
        assert all(torch.equal(value, together[0][0][name]) for name, value in state.items())


def test_what_rank_0_monitors_of_synchronized_layers_is_what_one_process_does(alone, together):
    snapshots = together[0][2]
    assert len(snapshots) == len(alone[2]) == STEPS // 5
    for here, there in zip(snapshots, alone[2], strict=True):
        for layer in ("bn1", "bn2"):
            assert not math.isnan(there[layer]["normalization_batch_size"])
            assert here[layer].items() >= {"source": "layer", "finite": True}.items()
            for measure, value in there[layer].items():
                if measure != "source":
                    assert here[layer][measure] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), measure


# ---------------------------------------------------------------- the monitor's average


SQUARED = {"mean_shift", "noise"}
AVERAGED = ("log_variance_ratio", "kl", "wasserstein2", "psi", "drift", "dead_fraction", "weight", "bias")


def _averaged(rank, world_size):
    """This rank's own numbers, and those across ranks, of the same steps of plain layers."""
    model = _network()
    with torch.no_grad():
        model.bn1.weight.add_(rank)  # so that every measure differs over ranks
        model.bn1.bias.add_(rank)
        model.bn1.weight[: rank + 1] = 0
    monitors = [Monitor(model, every_n_steps=60, across_ranks=across) for across in (False, True)]
    for step in range(60):
        for monitor in monitors:
            monitor.before()
        model(_global_batch(step)[0].chunk(world_size)[rank])
        found = [monitor.after(step) for monitor in monitors]
    return [snapshot.layers["bn1"]._asdict() for snapshot in found]


@pytest.mark.parametrize("world_size", WORLDS)
def test_across_ranks_the_monitor_tells_the_mean_of_what_each_rank_would(world_size):
    ranks = run(_averaged, world_size)
    own = [mine for mine, _ in ranks]
    for measure in (*SQUARED, *AVERAGED):
        power = 2 if measure in SQUARED else 1
        values = [mine[measure] ** power for mine in own]
        assert world_size == 1 or len(set(values)) > 1, measure
        expected = (sum(values) / world_size) ** (1 / power)
        for _, across in ranks:
            assert across[measure] == pytest.approx(expected, rel=1e-9), measure


# ---------------------------------------------------------------- recalibration


def _batches():
    return [_global_batch(step)[0][: 2 + step] for step in range(7)]


def _recalibrate(rank, world_size, shares):
    model, first = _network(), sum(shares[:rank])
    report = bnkit.recalibrate(model, _batches()[first : first + shares[rank]], max_samples=None)
    return model.state_dict(), report.samples


def _seen_by_layers(model, batches):
    """All that reaches each BatchNorm layer, with the layers before it normalising by the batch; by torch alone."""
    inputs, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            keep = inputs.setdefault(name, [])
            handles.append(layer.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0])))
    with torch.no_grad():
        for batch in batches:
            copy.deepcopy(model).train()(batch)
    return {
        name: population(torch.cat([x.movedim(1, 0).flatten(1) for x in seen], 1).T) for name, seen in inputs.items()
    }


@pytest.mark.parametrize("shares", [(7,), (4, 3), (0, 7), (1, 3, 1, 2), (5, 0, 2, 0)])
def test_recalibration_gives_all_ranks_the_same_bits_which_are_the_pooled_statistics(shares):
    found = run(_recalibrate, len(shares), shares)
    expected = _seen_by_layers(_network(), _batches())
    assert len(expected) == 2
    for state, samples in found:
        assert samples == sum(len(batch) for batch in _batches())
        assert all(torch.equal(value, found[0][0][name]) for name, value in state.items())
        for name, (mean, var) in expected.items():
            torch.testing.assert_close(state[f"{name}.running_mean"], mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state[f"{name}.running_var"], var, rtol=1e-10, atol=1e-10)


def _prior(rank, world_size):
    groups = [torch.distributed.new_group(members) for members in ([0], [1, 2])]
    model = _network()
    model.bn1.running_mean.fill_(rank)
    before = model.bn1.running_mean.clone()
    bnkit.recalibrate(model, _batches(), prior_samples=1e12, process_group=groups[min(rank, 1)])
    return before, model.bn1.running_mean


def test_in_a_process_group_the_prior_is_its_first_ranks():
    (own, alone), (first, here), (_, there) = run(_prior, 3)
    torch.testing.assert_close(alone, own)
    torch.testing.assert_close(here, first)
    assert torch.equal(here, there)


# ---------------------------------------------------------------- two nodes, rehearsed on one machine


SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
SHORT = "swap=sync data.train_size=128 data.validation_size=64 trainer.max_epochs=1 test=false threads=1 logger=csv"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def _start(folder, name, *command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [*TORCHRUN, *command, str(SCRIPT), "trainer=ddp", *SHORT.split()],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(folder, jobs):
    try:
        codes = {name: job.wait(200) for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            job.kill()
    assert not any(codes.values()), "".join((folder / f"{name}.log").read_text() for name in codes)
    [run_dir] = (folder / "outputs" / "train").iterdir()  # the nodes agree on its name
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_nodes_of_one_process_train_the_model_of_one_node_with_two_in_one_directory(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    meeting = ["--nproc_per_node=1", "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    nodes = {
        name: _start(tmp_path / "two", name, *meeting, f"--rdzv_id={port}") for name in ("first node", "second node")
    }
    node = {"node": _start(tmp_path / "one", "node", "--standalone", "--nproc_per_node=2")}
    two, one = _wait(tmp_path / "two", nodes), _wait(tmp_path / "one", node)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(two[name], value), name
