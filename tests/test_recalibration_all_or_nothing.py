"""A recalibration that fails has changed nothing; one that succeeds, the running statistics alone."""

import copy
import linecache
import random
import sys

import numpy as np
import pytest
import torch
from helpers.references import ConvNet, assert_population, assert_same, inputs, snapshot
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import bnkit


class Stateful(ConvNet):
    """Buffers that a forward changes, in place and by replacement, and random numbers that it draws."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.conv2 = spectral_norm(self.conv2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("data", torch.zeros(3))
        self.register_buffer("other_data", torch.zeros(3))
        self.register_buffer("cache", None)

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.data.data.add_(1)
        self.other_data.data = self.other_data.data + 1
        self.cache = x.detach().mean()
        self.register_buffer("late", torch.ones(1), persistent=False)
        random.random(), np.random.rand()
        return super().forward(x + 0.01 * torch.randn_like(x))


def _buffers(model):
    return {(name, key) for name, module in model.named_modules() for key in module._buffers}


def _random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class _BrokenLoader:
    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from inputs(2)
        raise self.error


def _interrupted(model, batch):
    if batch[0, 0, 0, 0] == 99:
        raise KeyboardInterrupt
    return model(batch)


def _with(value, at=2):
    data = inputs(4)
    data[at][0, 0, 0, 0] = value
    return data


FAILURES = {
    "the loader raises": (lambda: {"batches": _BrokenLoader(OSError("disk"))}, OSError, "disk"),
    "Ctrl-C in the loader": (lambda: {"batches": _BrokenLoader(KeyboardInterrupt())}, KeyboardInterrupt, None),
    "Ctrl-C in the model": (lambda: {"batches": _with(99), "forward": _interrupted}, KeyboardInterrupt, None),
    "the model raises": (lambda: {"batches": [*inputs(2), torch.randn(3, 7, 8, 8)]}, RuntimeError, "channels"),
    "an empty loader": (lambda: {"batches": []}, ValueError, "no batch"),
    "a used-up iterator": (lambda: {"batches": iter([])}, ValueError, "a list or a DataLoader"),
    "NaN": (lambda: {"batches": _with(torch.nan)}, FloatingPointError, r"Batch 2 .*'bn1'.*on_nonfinite"),
    "infinity": (lambda: {"batches": _with(torch.inf)}, FloatingPointError, r"Batch 2 .*'bn1'"),
    "only NaN, to be skipped": (
        lambda: {"batches": [x * torch.nan for x in inputs(2)], "on_nonfinite": "skip"},
        ValueError,
        "Every one of the 2 batches",
    ),
    "a batch that cannot be fed": (lambda: {"batches": [*inputs(1), "text"]}, TypeError, "forward="),
    "no layer reached": (lambda: {"batches": inputs(2), "forward": lambda model, batch: None}, ValueError, "none of"),
}


@pytest.mark.parametrize("consistency", ["batch", "population"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failure_all_is_as_it_was(failure, training, consistency):
    make, error, message = FAILURES[failure]
    options = {"consistency": consistency} | make()
    model = Stateful().train(training)
    model(inputs(1)[0])  # statistics that are not the initial ones
    before, states = snapshot(model), _random_states()
    with pytest.raises(error, match=message):
        bnkit.recalibrate(model, options.pop("batches"), **options)
    assert_same(before, snapshot(model))
    assert _random_states() == states


@pytest.mark.parametrize("consistency", ["batch", "population"])
def test_after_success_only_the_running_statistics_have_changed(consistency):
    model, data = Stateful(), inputs()
    for _ in range(3):
        model(data[0])
    model.cache = None
    del model.late
    before, states, names = snapshot(model), _random_states(), _buffers(model)
    bnkit.recalibrate(model, data, consistency=consistency)
    assert _buffers(model) == names
    assert model.cache is None
    assert_same(before, snapshot(model), except_running=["bn1", "bn2"])
    assert _random_states() == states
    assert not torch.equal(before["tensors"]["bn1.running_mean"][1], model.bn1.running_mean)


def test_the_loaders_own_generators_are_as_before():
    dataset = TensorDataset(torch.randn(20, 2, 8, 8))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    loader = DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=generators[0]), generator=generators[1])
    states = [generator.get_state() for generator in generators]
    bnkit.recalibrate(ConvNet(), loader)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


def test_a_batch_that_is_not_finite_is_skipped_on_request_and_counted():
    data = _with(torch.nan)
    model, clean = ConvNet(), ConvNet()
    clean.load_state_dict(model.state_dict())
    report = bnkit.recalibrate(model, data, on_nonfinite="skip")
    bnkit.recalibrate(clean, [data[0], data[1], data[3]])
    assert (report.skipped, report.batches, report.samples) == (1, 3, 24)
    assert torch.equal(model.bn2.running_var, clean.bn2.running_var)
    assert "1 skipped" in report.table()


def test_statistics_that_are_not_finite_are_mended():
    model, data = ConvNet(), inputs()
    model.bn1.running_mean.fill_(torch.nan)
    model.bn1.running_var.fill_(torch.inf)
    bnkit.recalibrate(model, data)
    assert_population(model.bn1, model.conv1(torch.cat(data)))


def test_accumulated_gradients_survive():
    model, data = ConvNet(), inputs()
    model(data[0]).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    bnkit.recalibrate(model, data[1:])
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_buffer_that_others_hold_is_written_in_place():
    model = ConvNet()
    held = model.bn1.running_mean
    bnkit.recalibrate(model, inputs())
    assert held is model.bn1.running_mean
    assert held.abs().max() > 0


def test_statistics_too_large_for_the_buffers_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(2).half())
    before = snapshot(model)
    x = torch.randn(64, 2) * 1e4
    with pytest.raises(ValueError, match=r"'0'.*float16.*float32"):
        bnkit.recalibrate(model, x.split(16), forward=lambda m, b: m(b.half()))
    assert_same(before, snapshot(model))


def test_one_value_per_channel_names_batch_and_cure():
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Batch 1 .*drop_last=True"):
        bnkit.recalibrate(model, [torch.randn(4, 3), torch.randn(1, 3)])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "options",
    [
        {"max_samples": 0},
        {"max_samples": "all"},
        {"tolerance": 0},
        {"tolerance": "1%"},
        {"tolerance": float("nan")},
        {"prior_samples": -1},
        {"prior_samples": "many"},
        {"prior_samples": float("inf")},
        {"consistency": "layer"},
        {"on_nonfinite": "ignore"},
        {"frozen": ["nowhere"]},
    ],
)
def test_an_argument_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bnkit.recalibrate(ConvNet(), inputs(), **options)


def test_a_prior_that_is_not_finite_is_refused():
    model = ConvNet()
    model.bn2.running_var.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"prior_samples.*'bn2'"):
        bnkit.recalibrate(model, inputs(), prior_samples=5)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="Linear has no BatchNorm layers"):
        bnkit.recalibrate(nn.Linear(2, 2), [torch.randn(2, 2)])


def test_arguments_in_the_wrong_order_are_told():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, and it comes first; it is a list"):
        bnkit.recalibrate(inputs(), ConvNet())


def test_a_scripted_or_lazy_model_is_refused():
    with pytest.raises(TypeError, match="scripted"):
        bnkit.recalibrate(torch.jit.script(ConvNet()), inputs())
    with pytest.raises(ValueError, match="lazy layer '1'"):
        bnkit.recalibrate(nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d()), inputs())


def test_a_model_that_overrides_train_is_not_asked_to():
    class Fussy(ConvNet):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    model = Fussy()
    model.bn1.training = model.training = True
    bnkit.recalibrate(model, inputs())
    assert model.training


def test_ctrl_c_at_any_line_leaves_the_model_whole():
    """Interrupt a recalibration at its n-th line of bnkit, for every n: the model is as it was, or calibrated."""
    data = inputs(2)
    model = Stateful()
    model(data[0])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = copy.deepcopy(model)
    bnkit.recalibrate(done, data)
    fresh = snapshot(model)["modules"]

    def interrupted_at(number):
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if "/bnkit/" not in frame.f_code.co_filename:
                return None
            # Between "finally" and "try" Python does not look for signals, but does report lines.
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if event == "line" and line not in ("try:", "finally:"):
                lines += 1
                if lines == number:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            bnkit.recalibrate(model, data)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    number = 1
    while interrupted_at(number):
        state = model.state_dict()
        same = all(torch.equal(state[name], start[name]) for name in start)
        calibrated = all(torch.equal(state[name], value) for name, value in done.state_dict().items())
        assert same or calibrated, f"interrupted at line {number}"
        assert snapshot(model)["modules"] == fresh, f"interrupted at line {number}"
        model.load_state_dict(start)
        number += 1
    assert number > 500


def test_one_buffer_made_in_inference_mode_is_no_hindrance():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return x

    model, data = nn.Sequential(nn.BatchNorm1d(3), Counter()), torch.randn(4, 8, 3)
    with torch.inference_mode():
        model(data[0])
    bnkit.recalibrate(model, data)
    assert_population(model[0], data.flatten(0, 1))
    assert model[1].count == 1


def test_the_progress_bar_shows_the_pass(capsys):
    bnkit.recalibrate(ConvNet(), inputs(), progress=True, consistency="population")
    shown = capsys.readouterr().err
    assert "layer 1/2" in shown
    assert "layer 2/2" in shown
    bnkit.recalibrate(ConvNet(), inputs())
    assert not capsys.readouterr().err
