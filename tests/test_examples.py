"""The examples, run as a user runs them: from another directory, with nothing but what the README installs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.references import population
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnkit

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(cwd: Path, name: str, *arguments: str) -> str:
    """What the example prints."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


def example(name: str):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(state: dict[str, torch.Tensor], x: torch.Tensor, *, by_batch: bool) -> tuple[torch.Tensor, list]:
    """The logits of a network of the examples in float64, from its weights alone, and what each BatchNorm is given."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x, inputs = x.double(), []
    for i, stride in zip((0, 3, 6), (1, 2, 2), strict=True):
        if f"{i + 1}.running_mean" not in state:
            break
        x = F.conv2d(x, state[f"{i}.weight"], stride=stride, padding=1)
        inputs.append(x)
        mean, var = (state[f"{i + 1}.running_{what}"] for what in ("mean", "var"))
        mean, var = population(x) if by_batch else (mean, var)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        x = (x * state[f"{i + 1}.weight"].view(shape) + state[f"{i + 1}.bias"].view(shape)).relu()
    head = max(int(name.split(".")[0]) for name in state)
    return x.mean((2, 3)) @ state[f"{head}.weight"].T + state[f"{head}.bias"], inputs


def check_recalibrated(state, train_set, batch_size):
    """The running statistics are those of the training data, in batches of this size, under these weights."""
    images = train_set.tensors[0][torch.randperm(len(train_set), generator=torch.Generator().manual_seed(9))]
    calls = [read(state, batch, by_batch=True)[1] for batch in images.split(batch_size)]
    for index, inputs in enumerate(zip(*calls, strict=True)):
        mean, var = population(torch.cat(inputs))
        off = ((state[f"{3 * index + 1}.running_mean"].double() - mean).abs() / var.sqrt()).max()
        ratio = (state[f"{3 * index + 1}.running_var"].double() / var).log().abs().max()
        # What the first layer is given depends on no batch; the others' on how the images fell into batches.
        assert off < (2e-6 if index == 0 else 0.03), (index, off)
        assert ratio < (2e-6 if index == 0 else 0.06), (index, ratio)


def accuracy(state, val_set) -> str:
    """As the examples print it."""
    images, labels = val_set.tensors
    right = read(state, images, by_batch=False)[0].argmax(1) == labels
    return f"{100 * right.double().mean():.2f} %"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--ghost", "8")], ids=["plain", "ghost"])
def test_plain_pytorch_validates_and_saves_recalibrated_statistics(tmp_path, options):
    printed = run(tmp_path, "plain_pytorch.py", "--epochs", "2", "--out", "run", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing is written elsewhere"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"epoch0.ckpt", "epoch1.ckpt", "model.pt"}
    train_set, val_set = example("plain_pytorch").data()
    epochs = re.findall(r"^epoch \d: (.*%) by the running average, (.*%) recalibrated$", printed, re.MULTILINE)
    assert len(epochs) == 2
    for epoch, (_, recalibrated) in enumerate(epochs):
        checkpoint = torch.load(tmp_path / "run" / f"epoch{epoch}.ckpt", weights_only=True)
        assert f"{checkpoint['accuracy']:.2f} %" == recalibrated == accuracy(checkpoint["model"], val_set)
        if not options:
            check_recalibrated(checkpoint["model"], train_set, 16)
        check_first_layer(checkpoint["model"], train_set)
    exported = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, checkpoint["model"][name]) for name, tensor in exported.items())
    assert f"Exported run/model.pt: {recalibrated}" in printed
    assert ("3 of 3 layers were swapped" in printed) == bool(options)


def check_first_layer(state, train_set):
    mean, var = population(read(state, train_set.tensors[0], by_batch=True)[1][0])
    assert ((state["1.running_mean"].double() - mean).abs() / var.sqrt()).max() < 2e-6
    torch.testing.assert_close(state["1.running_var"].double(), var, rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("options", [(), ("--devices", "2"), ("--devices", "2", "--sync")], ids=" ".join)
def test_fabric_gives_all_processes_the_statistics_of_all_the_data(tmp_path, options):
    printed = run(tmp_path, "fabric.py", "--epochs", "2", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    train_set, val_set = example("fabric").data()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    check_first_layer(checkpoint["model"], train_set)
    check_recalibrated(checkpoint["model"], train_set, 32 if "--sync" in options else 16)
    recalibrated = accuracy(checkpoint["model"], val_set)
    assert f"{checkpoint['accuracy']:.2f} %" == recalibrated
    assert f"Saved last.ckpt: {recalibrated}" in printed
    apart = re.findall(r"running means differ by (.*), then by (.*)$", printed, re.MULTILINE)
    assert [after for _, after in apart] == ["0", "0"], "the same bits on both"
    assert all((float(before) > 1e-3) == (options == ("--devices", "2")) for before, _ in apart)


@pytest.fixture
def fabric():
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def _loader(fabric):
    data = TensorDataset(torch.randn(24, 2))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    return fabric.setup_dataloaders(DataLoader(data, 4, sampler=sampler), use_distributed_sampler=False)


def test_fabrics_wrapper_is_looked_through(fabric):
    model = fabric.setup(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    assert list(bnkit.recalibrate(model, _loader(fabric)).layers) == ["1"]
    assert list(bnkit.Monitor(model).layers) == ["1"]
    with bnkit.observe(model) as seen:
        model(torch.randn(8, 2))
    assert list(seen) == ["1"]
    with pytest.warns(UserWarning, match="'2' matches no"):
        assert list(bnkit.swap(model, {"1": bnkit.norms.Ghost(2), "2": None}).layers) == ["1"]
    assert bnkit.revert(model) == ["1"]


@pytest.mark.parametrize("consistency", ["batch", "population"])
def test_recalibration_leaves_fabrics_loader_where_it_was(fabric, consistency):
    """Fabric shuffles by how often its loader was iterated."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))

    def epochs(recalibrated):
        torch.manual_seed(0)
        loader, batches = _loader(fabric), []
        for _ in range(2):
            batches += [x for (x,) in loader]
            if recalibrated:
                bnkit.recalibrate(model, loader, consistency=consistency)
        return torch.cat(batches)

    assert torch.equal(epochs(recalibrated=True), epochs(recalibrated=False))
