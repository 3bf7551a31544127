"""The monitor reads the model only, tells planted faults from the layers' own noise, and says what it cannot know."""

import copy
import io
import math

import pytest
import torch
from helpers.processes import run
from helpers.references import ConvNet, assert_same, inputs, snapshot
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bnkit
from bnkit import Monitor, norms
from bnkit.layers import batch_norm_layers
from bnkit.probes import train_eval_gap
from bnkit.shift import shift
from bnkit.training import Digits, ResNet


def _train(model, batches, monitor=None, lr=0.05, on_step=None, first=0):
    """Train on (x, y); the snapshots."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    snapshots = []
    for step, (x, y) in enumerate(batches, start=first):
        if on_step is not None:
            x = on_step(step, x)
        if monitor is not None:
            monitor.before()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if lr:
            optimizer.step()
        if monitor is not None:
            snapshots.append(monitor.after(step, len(x)))
    return [found for found in snapshots if found is not None]


def _batches(steps, size=8):
    return [(x, torch.randint(3, (len(x),))) for x in inputs(steps, size)]


@pytest.fixture(scope="module")
def digits():
    data = Digits(batch_size=64)
    data.prepare_data()
    data.setup("fit")

    def batches(steps):
        while True:
            for batch in data.train_dataloader():
                yield batch
                steps -= 1
                if not steps:
                    return

    return batches


# ---------------------------------------------------------------- measures


def _references(model, monitor, batches, run=lambda model, x: model(x)):
    """Every layer's measures, from its inputs in float64; and the snapshot."""
    layers, found, result = batch_norm_layers(model), {name: [] for name in batch_norm_layers(model)}, None
    for step, x in enumerate(batches):
        old = {n: bnkit.Moments(1, m.running_mean.clone(), m.running_var.clone()) for n, m in layers.items()}
        monitor.before()
        with bnkit.observe(model, exact=True) as seen:
            run(model, x)
        result = monitor.after(step, len(x))
        for name, moments in seen.items():
            unbiased = bnkit.Moments(moments.count, moments.mean, moments.var * moments.count / (moments.count - 1))
            found[name].append(shift(unbiased, old[name], layers[name].eps))
    return result, found


def _assert_measures(measures, shifts, rel=1e-3):
    assert measures.source == "layer"
    assert measures.mean_shift == pytest.approx(
        torch.stack([s.mean for s in shifts]).square().mean().sqrt().item(), rel=rel
    )
    ratios = torch.stack([s.log_variance_ratio for s in shifts])
    assert measures.log_variance_ratio == pytest.approx(ratios.mean().item(), rel=rel, abs=rel)
    assert measures.kl == pytest.approx(torch.stack([s.kl for s in shifts]).mean().item(), rel=rel, abs=1e-5)
    assert measures.wasserstein2 == pytest.approx(shifts[-1].wasserstein2.mean().item(), rel=rel, abs=1e-4)
    assert measures.psi == pytest.approx(shifts[-1].psi.mean().item(), rel=rel, abs=1e-4)
    assert measures.finite is True


@pytest.mark.parametrize("momentum", [0.1, 0.001, 1.0, None])
def test_measures_are_those_of_the_layers_inputs(momentum):
    model = ConvNet()
    model.bn1.momentum = momentum  # and bn2 has another
    result, shifts = _references(model, Monitor(model, every_n_steps=10), inputs(10))
    for name in ("bn1", "bn2"):
        _assert_measures(result.layers[name], shifts[name], rel=1e-2 if momentum == 0.001 else 2e-3)


class _Checkpointed(ConvNet):
    def forward(self, x):
        x = checkpoint(lambda x: self.bn1(self.conv1(x)), x, use_reentrant=False)
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["float64", "checkpointed", "ghost", "renorm", "autocast", "accumulated"])
def test_measures_are_right_however_the_step_is_run(kind):
    model = _Checkpointed() if kind == "checkpointed" else ConvNet()
    batches = inputs(8)
    if kind == "float64":
        model, batches = model.double(), [x.double() for x in batches]
    if kind in ("ghost", "renorm"):
        bnkit.swap(model, norms.Ghost(4) if kind == "ghost" else norms.Renorm())

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            model(x).float().square().mean().backward()

    result, shifts = _references(model, Monitor(model, every_n_steps=8), batches, run)
    for name in ("bn1", "bn2"):
        _assert_measures(result.layers[name], shifts[name], rel=2e-2 if kind == "autocast" else 2e-3)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_is_measured_without_a_recompilation_or_a_graph_break(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ConvNet()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batches = inputs(7)
    compiled(batches[0])
    plain(batches[0])
    monitor = Monitor(compiled, every_n_steps=6, input_every_n_steps=None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, x in enumerate(batches[1:]):
            monitor.before()
            compiled(x)
            result = monitor.after(step, len(x))
    _, shifts = _references(plain, Monitor(plain, every_n_steps=6), batches[1:])
    for name in ("bn1", "bn2"):
        _assert_measures(result.layers[name], shifts[name], rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (9, 3)), (nn.BatchNorm1d, (9, 3, 5)), (nn.BatchNorm3d, (4, 3, 2, 3, 2))]
)
def test_layers_of_all_ranks_are_measured(kind, shape):
    model = nn.Sequential(kind(3))
    result, shifts = _references(model, Monitor(model, every_n_steps=5), [torch.randn(shape) for _ in range(5)])
    _assert_measures(result.layers["0"], shifts["0"], rel=2e-3)


def test_noise_and_the_batch_size_it_calls_for_are_those_of_what_is_normalised_together():
    found = {}
    for name, spec in (("plain", None), ("ghost", norms.Ghost(8))):
        model = nn.Sequential(nn.BatchNorm1d(64, momentum=0.01))
        if spec is not None:
            bnkit.swap(model, spec)
        monitor = Monitor(model, every_n_steps=200, noise_level=0.1)
        for step in range(200):
            monitor.before()
            model(torch.randn(32, 64))
            result = monitor.after(step, 32)
        found[name] = result.layers["0"]
    assert found["plain"].noise == pytest.approx(1 / math.sqrt(32), rel=0.03)
    assert found["ghost"].noise == pytest.approx(1 / math.sqrt(8), rel=0.03)
    for measures in found.values():  # sigma / sqrt(n) = 0.1 at n = 100, however the batch is cut
        assert measures.normalization_batch_size == pytest.approx(100, rel=0.06)


def test_a_small_last_batch_does_not_change_the_batch_size_that_is_called_for():
    model = nn.Sequential(nn.BatchNorm1d(64, momentum=0.01))
    monitor = Monitor(model, every_n_steps=200, noise_level=0.1)
    for step in range(200):
        size = 4 if step % 10 == 9 else 64
        monitor.before()
        model(torch.randn(size, 64))
        result = monitor.after(step, size)
    assert result.layers["0"].normalization_batch_size == pytest.approx(100, rel=0.2)


def test_without_the_number_of_samples_no_batch_size_is_told():
    for samples in (None, 0):
        model = nn.Sequential(nn.BatchNorm1d(3))
        monitor = Monitor(model, every_n_steps=3)
        for step in range(3):
            monitor.before()
            model(torch.randn(8, 3))
            result = monitor.after(step, samples)
        assert math.isnan(result.layers["0"].normalization_batch_size)
        assert math.isfinite(result.layers["0"].noise)


def _assert_alike(expected, found, rel=1e-5):
    assert found.source == expected.source
    assert found.finite == expected.finite
    assert _every(found) == pytest.approx(_every(expected), rel=rel, nan_ok=True)


# ---------------------------------------------------------------- unknown


def _every(measures):
    return [value for name, value in measures._asdict().items() if name not in ("source", "finite")]


def _fields(measures):
    return {name for name, value in measures._asdict().items() if isinstance(value, float) and not math.isnan(value)}


SOURCES = {
    "group": (lambda model: bnkit.swap(model, norms.Group(2)), "unknown: Group"),
    "frozen": (lambda model: bnkit.swap(model, norms.Frozen()), "input"),
    "eval": (lambda model: [layer.eval() for layer in batch_norm_layers(model).values()], "input"),
    "by Lightning": (
        lambda m: [setattr(x, "track_running_stats", False) for x in batch_norm_layers(m).values()],
        "input",
    ),
    "momentum 0": (lambda m: [setattr(x, "momentum", 0.0) for x in batch_norm_layers(m).values()], "input"),
    "half": (lambda m: [x.bfloat16() for x in batch_norm_layers(m).values()], "input"),
    "ghost": (lambda model: bnkit.swap(model, norms.Ghost(4)), "layer"),
    "domain": (lambda model: bnkit.swap(model, norms.Domain(("a", "b"))), "layer"),
    "average": (lambda model: bnkit.swap(model, norms.MovingAverage()), "layer"),
}


@pytest.mark.parametrize("when", ["from the start", "in mid-run"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_layer_is_measured_or_reported_unknown(kind, when):
    change, source = SOURCES[kind]
    model = ConvNet()
    monitor = None
    if when == "in mid-run":
        monitor = Monitor(model, every_n_steps=4, input_every_n_steps=2)
        _train(model, _batches(6), monitor, lr=0.0)
    change(model)
    if monitor is None:
        monitor = Monitor(model, every_n_steps=4, input_every_n_steps=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "half"):
        snapshots = _train(model, _batches(12), monitor, lr=0.0)
    for measures in snapshots[-1].layers.values():
        assert measures.source.startswith(source)
        if source.startswith("unknown"):
            assert all(math.isnan(value) for value in _every(measures))
            assert measures.finite is None
        else:
            assert math.isfinite(measures.kl)
            assert measures.finite is True
    # Statistics of 0 and 1 that are frozen from the start do not fit, and nothing else is wrong.
    assert {alarm.code for alarm in monitor.alarms} <= ({"stale"} if source == "input" else set())


def test_of_a_layer_that_keeps_no_mean_the_mean_is_unknown_and_not_zero():
    model = ConvNet()
    bnkit.swap(model, norms.MovingAverage())
    measures = _train(model, _batches(60), Monitor(model, every_n_steps=60))[-1].layers["bn1"]
    assert not {"mean_shift", "drift", "noise", "normalization_batch_size"} & _fields(measures)
    assert math.isfinite(measures.log_variance_ratio)


def test_layers_without_running_statistics_are_unknown():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    monitor = Monitor(model, every_n_steps=2)
    for step in range(2):
        monitor.before()
        model(torch.randn(8, 3))
        result = monitor.after(step)
    assert result.layers["0"].source.startswith("unknown: it keeps no running statistics")
    assert all(math.isnan(value) for value in _every(result.layers["0"]))
    assert result.layers["1"].source == "layer"


def test_inputs_are_not_reduced_where_hooks_do_not_reach():
    model = ConvNet()
    model.bn1.eval()
    monitor = Monitor(model, every_n_steps=2, input_every_n_steps=None)
    result = _train(model, _batches(2), monitor)[-1]
    assert result.layers["bn1"].source.startswith("unknown: it is in evaluation mode")
    assert not model.bn1._forward_hooks


def test_a_layer_that_takes_no_part_is_unknown_and_one_that_does_seldom_is_known():
    model = nn.ModuleDict({"always": nn.BatchNorm1d(4), "seldom": nn.BatchNorm1d(4), "never": nn.BatchNorm1d(4)})
    monitor = Monitor(model, every_n_steps=40)
    for step in range(40):
        monitor.before()
        x = torch.randn(16, 4)
        model["always"](x)
        if torch.rand(()) < 0.5:
            model["seldom"](x)
        result = monitor.after(step, 16)
    assert result.layers["seldom"].noise == pytest.approx(0.25, rel=0.5)
    assert result.layers["seldom"].source == "layer"
    assert math.isfinite(result.layers["seldom"].psi)
    assert result.layers["never"].source.startswith("unknown")
    assert all(math.isnan(value) for value in _every(result.layers["never"]))


@pytest.mark.parametrize("what", ["momentum", "buffers"])
def test_a_change_in_mid_window_is_unknown_at_most_and_no_alarm(what):
    model = ConvNet()
    monitor = Monitor(model, every_n_steps=10)

    def change(step, x):
        if step == 15:
            if what == "momentum":
                model.bn1.momentum = 0.3
            else:
                model.bn1.running_var = model.bn1.running_var.clone()
        return x

    snapshots = _train(model, _batches(30), monitor, lr=0.0, on_step=change)
    assert snapshots[1].layers["bn1"].source == ("layer" if what == "momentum" else snapshots[1].layers["bn1"].source)
    assert snapshots[1].layers["bn2"].source == "layer"
    if what == "buffers":
        assert snapshots[1].layers["bn1"].source.startswith("unknown")
    assert snapshots[2].layers["bn1"].source == "layer", "the monitor looks at the layers anew at each snapshot"
    assert not monitor.alarms


def test_a_layer_that_is_unfrozen_is_measured_at_every_step_again():
    model = ConvNet()
    model.bn1.eval()
    monitor = Monitor(model, every_n_steps=5, input_every_n_steps=1)
    assert _train(model, _batches(5), monitor)[-1].layers["bn1"].source == "input"
    model.bn1.train()
    assert _train(model, _batches(10), monitor, first=5)[-1].layers["bn1"].source == "layer"
    assert not model.bn1._forward_hooks


def test_models_of_no_one_and_many_layers():
    for layers in (0, 1, 300):
        model = nn.Sequential(*[nn.BatchNorm1d(1) for _ in range(layers)])
        monitor = Monitor(model, every_n_steps=3)
        for step in range(3):
            monitor.before()
            model(torch.randn(8, 1))
            result = monitor.after(step, 8)
        assert list(result.layers) == [str(i) for i in range(layers)]
        assert all(measures.source == "layer" for measures in result.layers.values())
        monitor.load_state_dict(monitor.state_dict())


# ---------------------------------------------------------------- reading only


def test_training_is_bit_identical_with_and_without():
    results = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = ConvNet(dropout=0.3)
        model.bn2.eval()
        monitor = Monitor(model, every_n_steps=4, input_every_n_steps=2) if watched else None
        before = snapshot(model)
        _train(model, _batches(15), monitor)
        if monitor is not None:
            monitor.close()
        assert snapshot(model)["modules"] == before["modules"]
        results.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_building_snapshots_and_states_leave_the_model_alone():
    model = ConvNet()
    model.bn1.eval()
    before = snapshot(model)
    monitor = Monitor(model)
    monitor.before()
    monitor.after(0, 8)
    monitor.snapshot()
    monitor.load_state_dict(monitor.state_dict())
    monitor.refresh()
    assert_same(before, snapshot(model))


def test_nothing_is_left_behind_by_an_exception_inside_a_step():
    model = ConvNet()
    model.bn1.eval()
    before = snapshot(model)
    monitor = Monitor(model, input_every_n_steps=1)
    monitor.before()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 99, 8, 8))
    monitor.close()
    assert_same(before, snapshot(model))
    monitor.close()


class _Reads(TorchDispatchMode):
    """Counts what would wait for a device, where the tensors are on one."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.item)
        self.reads += func.overloadpacket in waits
        return func(*args, **(kwargs or {}))


def test_between_snapshots_the_device_is_not_waited_for():
    model = ConvNet()
    monitor = Monitor(model, every_n_steps=5)
    _train(model, _batches(3), monitor)
    with _Reads() as mode:
        monitor.before()
        monitor.after(3, 8)
    assert mode.reads == 0
    monitor.after(4, 8)
    # Nor by a digest, whose looks at what is on the CPU are all guarded.
    with _Reads() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnkit.monitoring.step_measures.StepMeasures._all", staticmethod(lambda known: False))
        model.bn1.momentum = None  # no short cut in the recorder either
        for group in monitor._groups:
            group.recorder.before()
            group.recorder.after()
            group.digest()
    assert mode.reads == 0


# ---------------------------------------------------------------- alarms


@pytest.mark.slow
def test_the_stated_rate_of_false_alarms_is_kept_on_real_digits(digits):
    torch.manual_seed(0)
    model = ResNet(width=4, depths=(1, 1))
    monitor = Monitor(model, every_n_steps=50, false_alarms_per_1000_steps=10)
    _train(model, digits(1500), monitor, lr=0.0)
    expected = 10 * 1.5
    assert len(monitor.alarms) <= stats.poisson.ppf(0.999, expected)
    assert {alarm.code for alarm in monitor.alarms} <= {"shift"}


def test_on_normal_batches_there_are_at_most_as_many_false_alarms_as_stated_and_not_none():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.BatchNorm1d(32, momentum=0.01) for _ in range(4)])
    monitor = Monitor(layers, every_n_steps=50, false_alarms_per_1000_steps=20)
    for step in range(3000):
        monitor.before()
        for layer in layers:
            layer(torch.randn(32, 32))
        monitor.after(step, 32)
    assert 60 / 10 <= len(monitor.alarms) <= stats.poisson.ppf(0.999, 60)


def test_an_epochs_small_last_batch_is_no_alarm():
    model = nn.Sequential(nn.BatchNorm1d(64))
    monitor = Monitor(model, every_n_steps=50)
    for step in range(600):
        size = 8 if step % 150 == 149 else 128
        monitor.before()
        model(torch.randn(size, 64))
        monitor.after(step, size)
    assert monitor.alarms == []


@pytest.mark.slow
def test_healthy_training_on_digits_raises_next_to_no_alarm(digits):
    torch.manual_seed(0)
    model = ResNet(width=4, depths=(1, 1))
    monitor = Monitor(model, every_n_steps=25)
    _train(model, digits(500), monitor, lr=0.02)
    assert len(monitor.alarms) <= 1


PLANTED = 150


@pytest.mark.parametrize("fault", ["scale", "offset"])
def test_an_input_that_changes_is_told_at_the_first_layer_and_at_its_step(digits, fault):
    torch.manual_seed(0)
    model = ResNet(width=4, depths=(1, 1))
    monitor = Monitor(model, every_n_steps=25)
    change = {"scale": lambda x: 4 * x, "offset": lambda x: x + 2}[fault]
    _train(model, digits(250), monitor, lr=0.01, on_step=lambda step, x: change(x) if step >= PLANTED else x)
    alarms = [alarm for alarm in monitor.alarms if alarm.step >= PLANTED]
    assert [(alarm.code, alarm.layer) for alarm in alarms] == [("shift", "stem.1")], "once, while it lasts"
    assert PLANTED <= alarms[0].step <= PLANTED + 3
    assert len(monitor.alarms) == 1


def test_corrupted_weights_are_told_at_the_batchnorm_behind_them(digits):
    torch.manual_seed(0)
    model = ResNet(width=4, depths=(1, 1))

    def corrupt(step, x):
        if step == PLANTED:
            with torch.no_grad():
                model.stages[0][0].conv2.weight.add_(torch.randn_like(model.stages[0][0].conv2.weight) * 3)
        return x

    monitor = Monitor(model, every_n_steps=25)
    _train(model, digits(200), monitor, lr=0.01, on_step=corrupt)
    first, *later = monitor.alarms
    assert (first.code, first.layer) == ("shift", "stages.0.0.bn2")
    assert PLANTED <= first.step <= PLANTED + 3
    # The layers before it do shift, as soon as the large gradients have moved their weights.
    assert len(later) <= 1
    assert all(alarm.step > PLANTED + 5 for alarm in later)


@pytest.mark.parametrize("how", ["from the start", "when trained"])
def test_a_frozen_layer_whose_statistics_do_not_fit_is_stale(digits, how):
    torch.manual_seed(0)
    model = ResNet(width=4, depths=(1, 1))
    frozen = model.stages[0][0].bn1
    monitor = Monitor(model, every_n_steps=25, input_every_n_steps=5)
    if how == "when trained":
        _train(model, digits(60), monitor, lr=0.05)
        assert not monitor.alarms
    frozen.eval()

    def go_on(step, x):
        if step == 60:
            with torch.no_grad():
                model.stages[0][0].conv1.weight.mul_(-1)
        return x

    _train(model, digits(90), monitor, lr=0.01, on_step=go_on, first=60)
    alarms = [alarm for alarm in monitor.alarms if alarm.code == "stale"]
    assert [alarm.layer for alarm in alarms] == ["stages.0.0.bn1"]
    assert "stages.0.0.bn1" in alarms[0].message


def test_a_frozen_layer_that_fits_is_not_stale_and_one_that_was_recalibrated_no_longer():
    model, batches = ConvNet(), _batches(200)
    bnkit.recalibrate(model, [x for x, _ in batches], max_samples=None)
    model.bn1.eval()
    monitor = Monitor(model, every_n_steps=20, input_every_n_steps=2)
    _train(model, batches[:100], monitor, lr=0.0)
    assert monitor.alarms == []
    model.bn1.running_mean -= 3  # something has gone wrong, ...
    _train(model, batches[:60], monitor, lr=0.0, first=100)
    assert [alarm.layer for alarm in monitor.alarms if alarm.code == "stale"] == ["bn1"]
    model.bn1.running_mean += 3  # ... and is mended
    result = _train(model, batches[:60], monitor, lr=0.0, first=160)[-1]
    assert sum(alarm.code == "stale" for alarm in monitor.alarms) == 1
    assert result.layers["bn1"].mean_shift < 1


@pytest.mark.parametrize("cause", ["bias", "weight"])
def test_a_dead_layer_is_told_once(cause):
    model = ConvNet()
    monitor = Monitor(model, every_n_steps=10)

    def kill(step, x):
        if step == 15:
            with torch.no_grad():
                model.bn2.bias.fill_(-8) if cause == "bias" else model.bn2.weight.zero_()
        return x

    _train(model, _batches(60), monitor, lr=0.0, on_step=kill)
    assert [(alarm.code, alarm.layer, alarm.step) for alarm in monitor.alarms] == [("dead", "bn2", 19)]


def test_a_layer_that_begins_with_a_weight_of_zero_and_learns_is_not_dead():
    model = ConvNet()
    nn.init.zeros_(model.bn2.weight)
    monitor = Monitor(model, every_n_steps=10)

    def warm_up(step, x):
        with torch.no_grad():
            model.bn2.weight.fill_(1e-5 * step)
        return x

    _train(model, _batches(60), monitor, lr=0.0, on_step=warm_up)
    assert monitor.alarms == []


def test_a_layer_that_stays_at_a_weight_of_zero_is_dead():
    model = ConvNet()
    nn.init.zeros_(model.bn2.weight)
    monitor = Monitor(model, every_n_steps=10)
    _train(model, _batches(60), monitor, lr=0.0)
    assert [(alarm.code, alarm.layer) for alarm in monitor.alarms] == [("dead", "bn2")]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_nan_in_one_batch_is_one_alarm_at_the_first_layer(frozen):
    model = ConvNet()
    bnkit.recalibrate(model, inputs(20))
    model.bn1.train(not frozen)
    monitor = Monitor(model, every_n_steps=10, input_every_n_steps=1)
    poisoned = _train(model, _batches(60), monitor, lr=0.0, on_step=lambda step, x: x * math.nan if step == 33 else x)
    assert [(alarm.code, alarm.layer, alarm.step) for alarm in monitor.alarms] == [("nonfinite", "bn1", 33)]
    assert poisoned[3].layers["bn2"].finite is False
    assert poisoned[2].layers["bn2"].finite is True


def test_new_alarms_are_handed_out_once_each():
    model = ConvNet()
    nn.init.constant_(model.bn1.bias, -9)
    monitor, handed_out = Monitor(model, every_n_steps=2), []
    assert monitor.new_alarms() == []
    for x, y in _batches(8):
        _train(model, [(x, y)], monitor, lr=0.0)
        handed_out += monitor.new_alarms()
    assert handed_out
    assert handed_out == monitor.alarms
    resumed = Monitor(model)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.new_alarms() == []


def test_a_step_that_changes_its_inputs_is_not_taken_for_dropout():
    model = ConvNet(dropout=0.5)
    monitor = Monitor(model)
    x = torch.randn(16, 2, 8, 8)
    monitor.compare_with(train_eval_gap(model, x).seen)
    monitor.before()
    model(3 * x)  # as by augmentation inside the training step
    monitor.after(0)
    assert monitor.dropout_shift == {}, "not known"
    assert monitor.alarms == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_before_a_layer_is_told_with_its_name(dropout):
    model = ConvNet(dropout=dropout)
    monitor = Monitor(model, every_n_steps=50)

    def compare(step, x):
        if step % 10 == 0:
            monitor.compare_with(train_eval_gap(model, x).seen)
        return x

    _train(model, [(x, y) for x, y in _batches(41, 64)], monitor, lr=0.0, on_step=compare)
    assert monitor.dropout_shift.keys() == {"bn1", "bn2"}
    assert monitor.dropout_shift["bn1"] == pytest.approx(0, abs=1e-3)
    if dropout:
        assert [(alarm.code, alarm.layer) for alarm in monitor.alarms] == [("dropout", "bn2")], "once, while it lasts"
        assert "'drop', p=0.5" in monitor.alarms[0].message
    else:
        assert monitor.dropout_shift["bn2"] == pytest.approx(0, abs=1e-3)
        assert monitor.alarms == []


def test_a_comparison_loses_no_step_of_the_record():
    results = []
    for compared in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        monitor = Monitor(model, every_n_steps=20)
        seen = train_eval_gap(model, inputs(1)[0]).seen

        def compare(step, x, monitor=monitor, seen=seen, compared=compared):
            if compared and step in (0, 7, 8, 19):
                monitor.compare_with(seen)
            return x

        results.append(_train(model, _batches(20), monitor, on_step=compare)[-1].layers["bn1"])
    _assert_alike(*results)


# ---------------------------------------------------------------- resuming


def _equal(one, other):
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return all(map(_equal, one, other)) if isinstance(one, tuple) else one == other


@pytest.mark.slow
@pytest.mark.parametrize("at", [60, 117])  # at a snapshot, and between two
def test_an_interrupted_monitor_goes_on_exactly_as_an_uninterrupted_one(at):
    outcomes = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        model.bn1.eval()
        options = {"every_n_steps": 20, "input_every_n_steps": 3, "false_alarms_per_1000_steps": 50}
        monitor, batches = Monitor(model, **options), _batches(240)
        batches[150:] = [(5 * x, y) for x, y in batches[150:]]
        first = _train(model, batches[:at], monitor, lr=0.0)
        file = io.BytesIO()
        torch.save(monitor.state_dict(), file)
        if interrupted:
            file.seek(0)
            monitor = Monitor(model, **options)
            monitor.load_state_dict(torch.load(file, weights_only=True))
        snapshots = [*first, *_train(model, batches[at:], monitor, lr=0.0, first=at)]
        outcomes.append((snapshots, list(monitor.alarms)))
    (plain, alarms), (resumed, other_alarms) = outcomes
    assert alarms == other_alarms
    assert {alarm.code for alarm in alarms} >= {"shift", "stale"}
    for one, other in zip(plain, resumed, strict=True):
        assert one.step == other.step
        for name in one.layers:
            assert _equal(tuple(one.layers[name]), tuple(other.layers[name])), (one.step, name)


def test_saving_a_state_does_not_change_what_follows():
    results = []
    for saved in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        monitor = Monitor(model, every_n_steps=20)

        def save(step, x, monitor=monitor, saved=saved):
            if saved and step in (3, 13, 15):
                monitor.state_dict()
            return x

        results.append(_train(model, _batches(20), monitor, on_step=save)[-1].layers)
    for name, plain in results[0].items():
        _assert_alike(plain, results[1][name])


def test_a_state_of_another_model_gives_its_alarms_alone():
    model, other = ConvNet(), nn.Sequential(nn.BatchNorm1d(3))
    nn.init.constant_(model.bn1.bias, -9)
    monitor, second = Monitor(model, every_n_steps=4), Monitor(other, every_n_steps=4)
    _train(model, _batches(6), monitor, lr=0.0)
    assert monitor.alarms
    second.load_state_dict(monitor.state_dict())
    assert second.alarms == monitor.alarms
    second.before()
    other(torch.randn(8, 3))
    assert second.after(0) is None, "its own steps are counted from the start"


# ---------------------------------------------------------------- ranks


class _Counted:
    """Counts the collectives."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.gather(*args, **kwargs)


def _watch(rank, world_size, across, frozen, spec):
    from bnkit import ranks

    torch.manual_seed(0)
    model = ConvNet().double()
    if frozen:
        model.bn1.eval()
    if spec is not None:
        bnkit.swap(model, spec)
    data = [x.double() for x in inputs(24, size=8 * world_size)]
    monitor = Monitor(model, every_n_steps=12, input_every_n_steps=4, across_ranks=across)
    counted = _Counted()
    counted.gather, ranks.all_gather = ranks.all_gather, counted
    snapshots = []
    for step, x in enumerate(data):
        monitor.before()
        model(x[8 * rank : 8 * rank + 8])
        snapshots.append(monitor.after(step, 8))
    return [found.layers for found in snapshots if found is not None], counted.calls


@pytest.mark.ddp
@pytest.mark.parametrize("frozen", [False, True])
def test_across_ranks_the_measures_are_the_mean_over_the_ranks_by_one_collective_a_snapshot(frozen):
    together = run(_watch, 2, True, frozen, None)
    alone = [result[0] for result in run(_watch, 2, False, frozen, None)]
    for layers, calls in together:
        assert calls == 2
        assert repr(layers) == repr(together[0][0]), "the same on every rank"
    for which, layers in enumerate(together[0][0]):
        for name, measures in layers.items():
            parts = [rank[which][name] for rank in alone]
            for field in ("log_variance_ratio", "kl", "wasserstein2", "psi", "dead_fraction"):
                mean = sum(getattr(part, field) for part in parts) / 2
                assert getattr(measures, field) == pytest.approx(mean, rel=1e-9), (name, field)
            for field in ("mean_shift", "noise"):
                mean = sum(getattr(part, field) ** 2 for part in parts) / 2
                assert getattr(measures, field) == pytest.approx(math.sqrt(mean), rel=1e-9), (name, field)


@pytest.mark.ddp
def test_a_synchronized_layer_tells_what_one_process_with_the_whole_batch_would():
    (synchronized, _), _ = run(_watch, 2, False, False, norms.Sync())
    torch.manual_seed(0)
    model = ConvNet().double()
    data = [x.double() for x in inputs(24, size=16)]
    monitor = Monitor(model, every_n_steps=12)
    for step, x in enumerate(data):
        monitor.before()
        model(x)
        found = monitor.after(step, 16)
    for name, alone in found.layers.items():
        _assert_alike(alone, synchronized[-1][name], rel=1e-9)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_steps": 0},
        {"every_n_steps": 2.5},
        {"input_every_n_steps": 0},
        {"false_alarms_per_1000_steps": 0},
        {"false_alarms_per_1000_steps": math.nan},
        {"window": 29},
        {"window": 50.0},
        {"noise_level": 0},
        {"noise_level": math.nan},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Monitor(ConvNet(), **arguments)


def test_no_step_gives_no_snapshot():
    assert Monitor(ConvNet()).snapshot() is None


def test_several_calls_a_step_tell_no_batch_size():
    once, twice = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    monitor = Monitor(nn.ModuleList([once, twice]), every_n_steps=5)
    for step in range(5):
        monitor.before()
        once(torch.randn(8, 4))
        twice(torch.randn(8, 4))
        twice(torch.randn(8, 4))
        snapshot = monitor.after(step, samples=8)
    assert snapshot.layers["0"].normalization_batch_size > 0
    assert math.isnan(snapshot.layers["1"].normalization_batch_size)
    assert snapshot.layers["1"].noise > 0
