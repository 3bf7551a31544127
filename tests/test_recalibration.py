"""What recalibrate() computes, and for which layers."""

import json

import pytest
import torch
from helpers.references import ConvNet, assert_population, assert_same, inputs, population, snapshot
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bnkit


@pytest.mark.parametrize("shape", [(8,), (8, 4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("ratio", "bound"), [(0, 1e-6), (10, 1e-6), (1e2, 1e-5), (1e3, 1e-4), (1e4, 1e-3), (1e5, 1e-3)]
)
def test_variance_far_from_zero(ratio, bound, memory_format, shape):
    x = torch.randn(4096, *shape) * 0.1 + 0.1 * ratio
    if len(shape) == 3:
        x = x.contiguous(memory_format=memory_format)
    model = nn.Sequential(nn.BatchNorm2d(8) if len(shape) == 3 else nn.BatchNorm1d(8))
    bnkit.recalibrate(model, x.split(64))
    mean, var = population(x)
    assert ((model[0].running_var.double() - var).abs() / var).max() <= bound
    # The mean is as good as the float32 buffer can hold it.
    assert ((model[0].running_mean.double() - mean).abs() <= 2e-7 * mean.abs() + 1e-7).all()


def test_a_batch_too_large_for_the_kernels_float32_sums_is_reduced_in_float64():
    x = torch.randn(300_000, 2)
    model = nn.Sequential(nn.BatchNorm1d(2))
    report = bnkit.recalibrate(model, [x, x + 1], max_samples=None)
    assert report.layers["0"].source == "input"
    assert_population(model[0], torch.cat([x, x + 1]))


@pytest.mark.parametrize("first", [torch.randn(256, 2), torch.full((64, 2), torch.nan)], ids=["short", "nan"])
def test_the_first_batch_does_not_speak_for_others(first):
    x = torch.randn(300_000, 2) + (1e3 if first.isnan().any() else 0)
    model = nn.Sequential(nn.BatchNorm1d(2))
    bnkit.recalibrate(model, [first, x], max_samples=None, on_nonfinite="skip")
    assert_population(model[0], x if first.isnan().any() else torch.cat([first, x]))


def test_half_precision_input_of_a_float32_layer_is_exact():
    x = (torch.randn(40, 4, 28, 28) + 3).bfloat16()
    model = nn.Sequential(nn.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16):
        bnkit.recalibrate(model, x.split(20))
    assert_population(model[0], x)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 3), (8, 1), (1, 1, 1)])
def test_ragged_batches_count_by_their_size(sizes):
    x = torch.randn(sum(sizes), 2, 5, 5) + torch.arange(sum(sizes)).view(-1, 1, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(2))
    report = bnkit.recalibrate(model, x.split(list(sizes)))
    assert_population(model[0], x)
    assert (report.samples, report.batches) == (sum(sizes), len(sizes))


def test_a_loader_sorted_by_class_keeps_the_variance_between_batches():
    x = torch.randn(10, 16, 3) + 4 * torch.arange(10.0).view(10, 1, 1)
    model = nn.Sequential(nn.BatchNorm1d(3))
    bnkit.recalibrate(model, x)
    assert_population(model[0], x.flatten(0, 1))


def test_every_layer_gets_the_statistics_of_what_it_normalised():
    model, data = ConvNet(), inputs()
    seen = {"bn1": [], "bn2": []}
    for name, store in seen.items():
        getattr(model, name).register_forward_pre_hook(lambda _, args, store=store: store.append(args[0]))
    bnkit.recalibrate(model, data)
    for name, store in seen.items():
        assert_population(getattr(model, name), torch.cat(store))


def _recalibrated(model, data, **options):
    bnkit.recalibrate(model, data, **options)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum_does_not_matter_and_is_kept(momentum):
    data = inputs()
    models = [ConvNet(), ConvNet()]
    models[1].load_state_dict(models[0].state_dict())
    models[1].bn1.momentum = models[1].bn2.momentum = momentum
    expected, actual = (_recalibrated(model, data) for model in models)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert models[1].bn1.momentum == momentum


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_drop_path_are_off_meanwhile(training):
    class DropPath(nn.Module):
        def forward(self, x):
            return x * (torch.rand(len(x), 1, 1, 1) < 0.5) / 0.5 if self.training else x

    model, data = ConvNet(dropout=0.5), inputs()
    model.drop = nn.Sequential(model.drop, DropPath())
    plain = ConvNet()
    plain.load_state_dict(model.state_dict())
    model.train(training)
    with_it, without = _recalibrated(model, data), _recalibrated(plain, data)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert model.drop[0].training is training


def test_a_shared_layer_pools_all_its_calls():
    shared, fc = nn.BatchNorm1d(3), nn.Linear(3, 3)
    model, x, seen = nn.Sequential(shared, fc, shared), torch.randn(5, 8, 3) + 1, []
    shared.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    report = bnkit.recalibrate(model, x)
    assert list(report.layers) == ["0"]
    assert_population(shared, torch.cat(seen))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_calls_may_differ_from_batch_to_batch_in_number_size_and_way(by_keyword):
    """The first batches tell nothing of the later ones: a layer called once may be called often, or not at all."""
    calls = [1, 1, 3, 0, 2, 1] * 7
    batches = [torch.randn(int(n), 2, 3, 3) * 2 + k for k, n in enumerate(torch.randint(2, 9, (len(calls),)))]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.now_and_then = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x, calls):
            for k in range(calls):
                self.now_and_then(input=x + k) if by_keyword and k % 2 else self.now_and_then(x + k)
            return self.always(input=x) if by_keyword and calls else self.always(x)

    model = Model()
    report = bnkit.recalibrate(model, list(zip(batches, calls, strict=True)), forward=lambda m, batch: m(*batch))
    assert report.batches == len(calls) > 32
    assert_population(model.always, torch.cat(batches))
    seen = [x + k for x, number in zip(batches, calls, strict=True) for k in range(number)]
    assert_population(model.now_and_then, torch.cat(seen))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(ConvNet):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, plain, data = Checkpointed(), ConvNet(), inputs()
    plain.load_state_dict(model.state_dict())
    a, b = _recalibrated(model, data), _recalibrated(plain, data)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_bf16_model_is_calibrated_to_the_rounding_of_its_buffers():
    model, seen = nn.Sequential(nn.BatchNorm2d(3)).bfloat16(), torch.randn(64, 3, 4, 4).bfloat16() * 3 + 5
    report = bnkit.recalibrate(model, seen.split(8))
    mean, var = population(seen)
    assert report.layers["0"].source == "input"
    assert torch.equal(model[0].running_mean, mean.bfloat16())
    assert torch.equal(model[0].running_var, var.bfloat16())


def test_under_autocast_the_statistics_are_those_of_the_half_precision_activations():
    model, data, seen = ConvNet(), inputs(), []
    model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        bnkit.recalibrate(model, data)
    assert seen[0].dtype == torch.bfloat16
    assert_population(model.bn2, torch.cat(seen), rtol=2e-6)


def test_a_compiled_model_is_right_and_its_training_step_is_not_recompiled():
    model, data = ConvNet(), inputs()
    reference = ConvNet()
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")

    def step():
        compiled(data[0]).sum().backward()

    for _ in range(2):
        step()
    reference.load_state_dict(model.state_dict())
    a, b = _recalibrated(compiled, data), _recalibrated(reference, data)
    assert all(torch.equal(a["_orig_mod." + name], b[name]) for name in b)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step()


def test_wrappers_are_looked_through():
    model = ConvNet()
    assert list(bnkit.recalibrate(DataParallel(model), inputs()).layers) == ["bn1", "bn2"]


def test_a_synchronized_model_is_calibrated_on_the_cpu_where_torch_refuses_its_forward():
    model, data = ConvNet(), inputs()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet())
    synchronized.load_state_dict(model.state_dict())
    a, b = _recalibrated(synchronized, data), _recalibrated(model, data)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert type(synchronized.bn1) is nn.SyncBatchNorm


# --- layers that are left as they are


def test_frozen_layers_stay_bit_identical_and_are_named():
    model, data = ConvNet(), inputs()
    model.bn1.eval()
    before = snapshot(model)
    report = bnkit.recalibrate(model, data)
    assert_same(before, snapshot(model), except_running=["bn2"])
    assert report.kept == {"bn1": "frozen"}
    assert list(report.layers) == ["bn2"]
    # What bn2 normalised came through a bn1 that normalised by its running statistics.
    model.eval()
    assert_population(model.bn2, model.conv2(model.bn1(model.conv1(torch.cat(data))).relu()), rtol=1e-5)


def test_a_model_in_evaluation_mode_is_calibrated_and_frozen_can_be_said():
    model, data = ConvNet().eval(), inputs()
    before = snapshot(model)
    assert list(bnkit.recalibrate(model, data).layers) == ["bn1", "bn2"]
    assert_same(before, snapshot(model), except_running=["bn1", "bn2"])
    before = snapshot(model)
    assert bnkit.recalibrate(model, data, frozen=["bn2"]).kept == {"bn2": "frozen"}
    assert_same(before, snapshot(model), except_running=["bn1"])


def test_a_layer_without_running_statistics_is_named_and_left():
    model = ConvNet()
    model.bn1 = nn.BatchNorm2d(6, track_running_stats=False)
    report = bnkit.recalibrate(model, inputs())
    assert "track" in report.kept["bn1"]
    assert model.bn1.running_mean is None


def test_a_layer_that_stopped_tracking_keeps_its_buffers():
    model = ConvNet()
    model.bn1.track_running_stats = False  # as Lightning's BaseFinetuning.freeze does
    before = snapshot(model)
    bnkit.recalibrate(model, inputs())
    assert_same(before, snapshot(model), except_running=["bn2"])


@pytest.mark.parametrize("consistency", ["batch", "population"])
def test_a_layer_that_is_not_reached_is_kept_and_named(consistency):
    model = ConvNet()
    model.unused = nn.BatchNorm1d(4)
    before = snapshot(model)
    report = bnkit.recalibrate(model, inputs(), consistency=consistency)
    assert report.kept == {"unused": "not reached by the forward"}
    assert_same(before, snapshot(model), except_running=["bn1", "bn2"])


class _Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class _Doubles(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x * 2)


class _Tokens(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("consistency", ["batch", "population"])
def test_another_librarys_layer_that_normalises_its_input_is_calibrated(consistency):
    model, x = nn.Sequential(_Activated(3)), torch.randn(10, 8, 3) + 2
    bnkit.recalibrate(model, x, consistency=consistency)
    assert_population(model[0], x.flatten(0, 1))
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("consistency", ["batch", "population"])
@pytest.mark.parametrize(("layer", "shape"), [(_Doubles, (8, 3)), (_Tokens, (8, 3, 3)), (_Tokens, (8, 5, 3))])
def test_another_librarys_layer_that_normalises_something_else_is_kept_and_named(layer, shape, consistency):
    model = nn.Sequential(layer(3), nn.Flatten(), nn.LazyBatchNorm1d())
    model(torch.randn(shape))
    before, x = snapshot(model), torch.randn(5, *shape)
    report = bnkit.recalibrate(model, x, consistency=consistency)
    assert_same(before, snapshot(model), except_running=["2"])
    assert "0" in report.kept
    assert list(report.layers) == ["2"]


# --- how much data


def test_max_samples_is_a_cap_in_whole_batches():
    model, data = ConvNet(), inputs(batches=10, size=8)
    assert bnkit.recalibrate(model, data, max_samples=40).samples == 40
    assert bnkit.recalibrate(model, data, max_samples=47).samples == 40
    assert bnkit.recalibrate(model, data, max_samples=3).samples == 8, "one batch at least"
    assert bnkit.recalibrate(model, data, max_samples=None).samples == 80
    bnkit.recalibrate(model, data, max_samples=16)
    assert_population(model.bn1, model.conv1(torch.cat(data[:2])))


def test_tolerance_stops_when_every_channel_is_known_well_enough():
    x = torch.randn(400, 32, 3) * torch.tensor([1.0, 5.0, 0.1])
    model = nn.Sequential(nn.BatchNorm1d(3))
    report = bnkit.recalibrate(model, x, tolerance=0.02, max_samples=None)
    # The standard error of the mean of n independent samples is 1/sqrt(n): 2 % takes 2500 of the 12800.
    assert 1250 < report.samples < 5000
    assert (report.layers["0"].standard_error <= 0.02 * model[0].running_var.double().sqrt() * 1.01).all()
    assert bnkit.recalibrate(model, x, tolerance=1e-9, max_samples=None).samples == 12_800
    assert bnkit.recalibrate(model, x, tolerance=1e9, max_samples=None).batches == 4, "the spread of four, not of one"


def test_a_layer_that_is_not_reached_keeps_nothing_waiting():
    model = ConvNet()
    model.unused = nn.BatchNorm1d(4)
    assert bnkit.recalibrate(model, inputs(batches=20), tolerance=10).batches == 4


def test_prior_samples_weigh_what_the_model_had():
    x = torch.randn(4, 25, 3) * 2 + 1
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(-1)
    model[0].running_var.fill_(9)
    bnkit.recalibrate(model, x, prior_samples=300)
    mean, var = population(x.flatten(0, 1))
    torch.testing.assert_close(model[0].running_mean.double(), 0.75 * -1 + 0.25 * mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model[0].running_var.double(), 0.75 * 9 + 0.25 * var, rtol=1e-6, atol=0)


# --- consistency="population"


def _deep_net(layers=13, width=5):
    blocks = []
    for _ in range(layers):
        blocks += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()]
    return nn.Sequential(*blocks)


def test_population_consistency_on_thirteen_layers_at_batch_size_two():
    model = _deep_net()
    x = torch.randn(60, 2, 5) + 1
    report = bnkit.recalibrate(model, x, consistency="population")
    reference = _deep_net().double()
    reference.load_state_dict(model.state_dict())
    h = x.flatten(0, 1).double()
    for module in reference.eval():
        if isinstance(module, nn.BatchNorm1d):
            mean, var = population(h)
            module.running_mean.copy_(mean)
            module.running_var.copy_(var)
        h = module(h)
    for ours, theirs in zip(model, reference, strict=True):
        if isinstance(ours, nn.BatchNorm1d):
            torch.testing.assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-5, atol=0)
            std = theirs.running_var.sqrt()
            assert ((ours.running_mean.double() - theirs.running_mean) / std).abs().max() < 1e-5
    assert report.passes == 13
    assert report.samples == 120


def test_population_consistency_follows_the_forward_not_the_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.fc = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.fc(self.first(x)).tanh())

    model, x = Backwards(), torch.randn(30, 2, 3) + 2
    bnkit.recalibrate(model, x, consistency="population")
    x = x.flatten(0, 1)
    assert_population(model.first, x)
    assert_population(model.last, model.fc(model.eval().first(x)).tanh(), rtol=1e-5)


def test_population_consistency_runs_the_model_only_up_to_the_layer():
    model, reached = _deep_net(4), []
    model.append(nn.Identity())
    model[-1].register_forward_hook(lambda *_: reached.append(1))
    bnkit.recalibrate(model, torch.randn(6, 2, 5), consistency="population")
    assert len(reached) == 1, "only the forward that finds the order"


def test_population_consistency_sees_the_same_samples_in_each_pass():
    loader = DataLoader(TensorDataset(torch.randn(40, 5)), batch_size=4, shuffle=True)
    model, firsts = _deep_net(3), []
    model[0].register_forward_pre_hook(lambda _, args: firsts.append(args[0].clone()))
    bnkit.recalibrate(model, loader, consistency="population", max_samples=8)
    passes = [torch.cat(firsts[start : start + 2]) for start in range(1, 7, 2)]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[1], passes[2])


def test_population_consistency_with_a_shared_layer_pools_its_calls():
    shared = nn.BatchNorm1d(3)
    model, x, seen = nn.Sequential(shared, nn.Linear(3, 3), shared), torch.randn(20, 4, 3), []
    shared.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    bnkit.recalibrate(model, x, consistency="population")
    assert_population(shared, torch.cat(seen[2:]))  # the first forward found the order


def test_population_consistency_differs_from_one_pass_where_batches_are_small():
    x = torch.randn(60, 2, 5) + 1
    model = _deep_net()
    batch = _recalibrated(model, x)
    population_ = _recalibrated(model, x, consistency="population")
    difference = (batch["37.running_mean"] - population_["37.running_mean"]) / population_["37.running_var"].sqrt()
    assert difference.abs().max() > 0.01


# --- the report


def test_the_report_says_how_far_the_running_statistics_were_off():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.5))
    model[0].running_mean.copy_(torch.tensor([1.0, -1.0]))
    model[0].running_var.copy_(torch.tensor([3.5, 0.5]))
    x = torch.randn(100, 10, 2)
    report = bnkit.recalibrate(model, x)
    mean, var = population(x.flatten(0, 1))
    layer = report.layers["0"]
    torch.testing.assert_close(layer.mean_shift, (mean - torch.tensor([1.0, -1.0])) / torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(layer.var_ratio, (var + 0.5) / torch.tensor([4.0, 1.0]))
    batch_means = x.double().mean(1)
    torch.testing.assert_close(layer.standard_error, batch_means.std(0) / 10)
    assert report.worst.layer == "0"
    assert report.worst.shift == report.median_shift == pytest.approx(layer.mean_shift.square().mean().sqrt().item())
    table = report.table().splitlines()
    assert table[0].split()[0] == "layer"
    assert f"{layer.shift:.3g}" in table[2]
    assert "1000 samples in 100 batches" in table[-1]


def test_the_report_goes_into_json_whatever_is_unknown():
    model = ConvNet()
    model.unused = nn.BatchNorm1d(4)
    report = bnkit.recalibrate(model, inputs(batches=1))
    restored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert restored["layers"]["bn1"]["standard_error"] == [None] * 6
    assert restored["kept"] == {"unused": "not reached by the forward"}


def test_what_was_there_before_can_be_put_back_for_a_while():
    model, data = ConvNet(), inputs()
    old = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = bnkit.recalibrate(model, data)
    new = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def look_and_stop():
        with bnkit.running_statistics(model, report.before):
            assert all(torch.equal(buffer, old[name]) for name, buffer in model.named_buffers())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_and_stop()
    assert all(torch.equal(buffer, new[name]) for name, buffer in model.named_buffers())


# --- feeding


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x, scale=1.0):
        return self.bn(x * scale)


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, "label"], None),
        (lambda x: {"x": x, "scale": 1.0}, None),
        (lambda x: {"image": x, "id": "a"}, lambda model, batch: model(batch["image"])),
        (lambda x: type("Custom", (), {"x": x})(), lambda model, batch: model(batch.x)),
    ],
)
def test_batches_of_every_kind_can_be_fed(wrap, forward):
    x = torch.randn(4, 8, 3) + 2
    model = Reads()
    report = bnkit.recalibrate(model, [wrap(part) for part in x], forward=forward)
    assert_population(model.bn, x.flatten(0, 1))
    assert report.samples == 32 or forward is not None


@pytest.mark.parametrize("batch", ["text", 3, {"image": torch.zeros(2, 3)}, ([torch.zeros(2, 3)], 1), []])
def test_a_batch_that_cannot_be_fed_names_the_cure(batch):
    with pytest.raises(TypeError, match=r"pass forward="):
        bnkit.recalibrate(Reads(), [batch])


def test_inference_mode_outside_leaves_tensors_that_can_be_trained_with():
    model, data = ConvNet(), inputs()
    with torch.inference_mode():
        report = bnkit.recalibrate(model, data)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert not any(tensor.is_inference() for pair in report.before.values() for tensor in pair)
    model(data[0]).sum().backward()


def test_a_model_made_in_inference_mode_can_be_calibrated():
    with torch.inference_mode():
        model = ConvNet()
    x = inputs()
    bnkit.recalibrate(model, x)
    with torch.no_grad():
        assert_population(model.bn1, model.conv1(torch.cat(x)))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu(autocast, memory_format):
    model, seen = ConvNet().cuda().to(memory_format=memory_format), []
    model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data = [x.to(memory_format=memory_format) for x in inputs(offset=20)]
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        bnkit.recalibrate(model, data)
    assert_population(model.bn2, torch.cat(seen), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ratio", "bound"), [(0, 1e-6), (10, 1e-6), (1e2, 1e-5), (1e3, 1e-4), (1e4, 1e-3), (1e5, 1e-3)]
)
def test_variance_far_from_zero_on_a_gpu(ratio, bound):
    x = torch.randn(4096, 8, device="cuda") * 0.1 + 0.1 * ratio
    model = nn.Sequential(nn.BatchNorm1d(8)).cuda()
    bnkit.recalibrate(model, x.split(64))
    _, var = population(x)
    assert ((model[0].running_var.double() - var).abs() / var).max() <= bound
