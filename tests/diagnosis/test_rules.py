"""Each rule finds what it is for, and says nothing of a model that is well."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import bnkit
from bnkit import norms
from bnkit.diagnosis import CODES

GAIN = 3.0


class Net(nn.Module):
    """Convolutions without bias, each with BatchNorm; then a linear layer. ``dropout`` stands where it does no harm."""

    def __init__(self, *, bias=False, dropout_before=0.0, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(8, **options)
        self.inner = nn.Dropout(dropout_before)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=bias)
        self.bn2 = nn.BatchNorm2d(8, **options)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x)).relu()
        return self.head(self.dropout(x.mean((2, 3))))


def mlp():
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def images(samples=32, scale=1.0):
    """Images that differ in brightness, as real ones do: a sample's pixels correlate."""
    return scale * (torch.randn(samples, 2, 10, 10) + torch.randn(samples, 2, 1, 1))


def trained(model=None, steps=60, data=images):
    """With running statistics of the data, under weights that have stayed as they are."""
    model = Net() if model is None else model
    with torch.no_grad():
        for _ in range(steps):
            model(data())
    return model


def codes(model, **options):
    return [finding.code for finding in bnkit.diagnose(model, **options)]


def found(code, model, **options):
    findings = [finding for finding in bnkit.diagnose(model, **options) if finding.code == code]
    assert len(findings) <= 1
    return findings[0] if findings else None


# --- a healthy model gives nothing


@pytest.mark.parametrize("mode", ["fresh", "trained", "evaluated", "compiled", "half frozen", "frozen backbone"])
def test_a_healthy_model_gives_nothing(mode):
    model = Net() if mode == "fresh" else trained()
    if mode == "evaluated":
        model.eval()
    if mode == "half frozen":
        model.bn1.eval()
    if mode == "frozen backbone":
        model.conv1.requires_grad_(False)
        model.bn1.requires_grad_(False).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"batch_size": 32, "world_size": 8, "accumulate": 2, "optimizer": optimizer, "sample": images()}
    assert bnkit.diagnose(torch.compile(model, backend="eager") if mode == "compiled" else model, **options) == []


@pytest.mark.parametrize(
    "spec",
    [
        norms.Ghost(16),
        norms.Sync(),
        norms.Renorm(),
        norms.Frozen(),
        norms.Group(4),
        norms.Domain(("a", "b")),
        norms.MovingAverage(),
    ],
)
def test_a_healthy_variant_gives_nothing(spec):
    model = trained()
    bnkit.swap(model, spec)
    trained(model, 30)
    assert codes(model, batch_size=32, accumulate=2, sample=images()) == []
    assert codes(model.eval(), sample=images()) == []


def test_a_model_without_batch_norm_gives_nothing():
    assert bnkit.diagnose(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), batch_size=1) == []


# --- BN1xx: the batch


@pytest.mark.parametrize("remedy", [norms.Renorm(), norms.Frozen(), norms.Group(4), norms.MovingAverage(), None])
def test_a_small_batch_is_told_unless_the_layer_looks_beyond_it(remedy):
    model = trained()
    if remedy is not None:
        bnkit.swap(model, remedy)
    finding = found("BN101", model, batch_size=2)
    assert (finding is not None) == (remedy is None)
    if finding is not None:
        assert finding.layers == ("bn1", "bn2")
        assert f"{1 / math.sqrt(2):.2g}" in finding.message


def test_the_noise_that_a_sample_tells_is_that_of_the_batches_means():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8))
    finding = found("BN101", model, batch_size=4, sample=images(512))
    seen = []
    with torch.no_grad():
        for _ in range(400):
            with bnkit.observe(model) as batch:
                model(images(4))
            seen.append(batch["1"])
    noise = float(bnkit.shift.batch_noise(bnkit.Moments.pool(seen)).square().mean().sqrt())
    assert noise > 2 / math.sqrt(4 * 64), "the pixels correlate"
    assert float(finding.message.split("from batch to batch by ")[1].split()[0]) == pytest.approx(noise, rel=0.15)


def test_a_sample_tells_when_the_noise_of_a_small_batch_is_little():
    model, sample = Net(), torch.randn(4, 2, 64, 64)  # thousands of pixels that do not correlate
    assert "up to 1/sqrt(4) = 0.5 of" in found("BN101", model, batch_size=4).message
    message = found("BN101", model, batch_size=4, sample=sample).message
    assert float(message.split("from batch to batch by ")[1].split()[0]) < 0.05


def test_a_ghost_is_judged_by_its_own_size():
    model = Net()
    bnkit.swap(model, norms.Ghost(4))
    assert "Ghost" in found("BN101", model, batch_size=64).cure
    bnkit.swap(model, norms.Ghost(16))
    assert codes(model, batch_size=64) == []


def test_one_value_per_channel_is_an_error_before_training_raises_it():
    model = mlp()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 4))
    assert codes(model, batch_size=1) == ["BN102"]
    assert codes(model, sample=torch.randn(1, 4)) == ["BN102"]
    assert codes(model, batch_size=2, sample=torch.randn(16, 4)) == ["BN101"]


def test_one_image_has_many_values_and_a_frozen_layer_needs_none():
    assert "BN102" not in codes(Net(), batch_size=1)
    model = mlp()
    bnkit.swap(trained(model, data=lambda: torch.randn(16, 4)), norms.Frozen())
    assert codes(model, batch_size=1) == []


def test_a_last_batch_of_one_is_an_error_of_its_own_words():
    finding = found("BN102", mlp(), batch_size=16, smallest_batch=1)
    assert "last batch" in finding.message
    assert "drop_last" in finding.cure
    assert codes(mlp(), batch_size=16, smallest_batch=3) == []


def test_a_sample_of_one_that_training_will_not_have_is_refused():
    with pytest.raises(ValueError, match="single value per channel"):
        bnkit.diagnose(mlp(), batch_size=16, sample=torch.randn(1, 4))


def test_accumulation_is_told_where_the_batch_is_small():
    assert codes(Net(), batch_size=16, accumulate=4) == ["BN103"]
    assert codes(Net(), batch_size=64, accumulate=4) == []


def test_ranks_that_normalise_apart_are_told_until_they_are_synchronized():
    model = Net()
    assert codes(model, batch_size=4, world_size=8) == ["BN104"]
    assert codes(model, batch_size=2, world_size=2) == ["BN101"], "too few even together"
    bnkit.swap(model, norms.Sync())
    assert codes(model, batch_size=4, world_size=8) == []
    assert codes(nn.SyncBatchNorm.convert_sync_batchnorm(Net()).eval(), batch_size=4, world_size=8) == ["BN203"]


def test_a_very_large_batch_is_told_and_cut_by_ghosts():
    model = Net()
    assert codes(model, batch_size=2048) == ["BN105"]
    bnkit.swap(model, norms.Ghost(128))
    assert codes(model, batch_size=2048) == []


def test_a_ghost_as_large_as_the_batch_does_nothing():
    model = Net()
    bnkit.swap(model, norms.Ghost(32))
    assert codes(model, batch_size=48) == ["BN106"]
    assert codes(model, batch_size=64) == []


def test_sync_groups_that_do_not_divide_the_ranks_are_an_error():
    model = Net()
    bnkit.swap(model, norms.Sync(3))
    assert codes(model, batch_size=32, world_size=8) == ["BN107"]
    assert codes(model, batch_size=32, world_size=6) == []


# --- BN20x: what the running statistics hold


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite(value):
    model = trained()
    model.bn2.running_mean[3] = value
    assert found("BN201", model).layers == ("bn2",)


def test_a_negative_variance():
    model = trained()
    model.bn1.running_var[0] = -0.1
    assert found("BN202", model).layers == ("bn1",)
    assert codes(model) == ["BN202"], "and not as a dead channel too"


def test_statistics_that_were_never_updated():
    model = Net()
    assert codes(model) == [], "training has not begun"
    assert codes(model.eval()) == ["BN203"], "nobody should evaluate this"
    bnkit.recalibrate(model, [images()])
    assert codes(model) == [], "measured, though never updated"
    fresh = trained()
    fresh.bn2.reset_running_stats()
    assert found("BN203", fresh).layers == ("bn2",)
    learnt = Net()
    nn.init.normal_(learnt.bn1.bias)
    assert found("BN203", learnt).layers == ("bn1",)
    frozen = Net()
    bnkit.swap(frozen, norms.Frozen())
    assert found("BN203", frozen).layers == ("bn1", "bn2")


def test_dead_channels_by_their_share():
    model = trained()
    model.bn1.running_var[:5] = 1e-12
    model.bn2.running_var[:2] = 0.0
    assert found("BN204", model).layers == ("bn1",)
    assert found("BN205", model).layers == ("bn2",)
    assert "2 of 16 channels" in found("BN205", model).message
    assert codes(trained(data=lambda: images(scale=0.05))) == [], "small is not dead"


def test_no_running_statistics():
    assert codes(Net(track_running_stats=False), batch_size=32) == ["BN206"]
    model = trained()
    bnkit.swap(model, norms.Group(4))
    assert codes(model) == [], "Group does not track, and does not need to"


def test_half_precision_is_told_where_it_is_averaged_in():
    model = trained()
    model.bn1.to(torch.bfloat16)
    assert found("BN207", model).layers == ("bn1",)
    assert codes(model.eval()) == [], "inference averages nothing"
    bnkit.swap(model.train(), norms.Frozen())
    assert codes(model) == []


@pytest.mark.parametrize(("eps", "expected"), [(1e-5, []), (1e-3, []), (1e-8, []), (0.0, ["BN208"]), (0.1, ["BN208"])])
def test_eps(eps, expected):
    assert codes(Net(eps=eps)) == expected


# --- BN21x: how they follow


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        (0.1, []),
        (0.01, []),
        (0.003, []),
        (0.3, []),
        (0.9, ["BN211"]),
        (0.99, ["BN211"]),
        (1.0, ["BN211"]),
        (1.1, ["BN211"]),
        (-0.1, ["BN211"]),
        (1e-4, ["BN212"]),
        (0.0, ["BN212"]),
        (None, ["BN213"]),
    ],
)
def test_momentum(momentum, expected):
    model = Net(momentum=momentum)
    assert codes(model, batch_size=32) == expected
    bnkit.swap(model, norms.Group(4))
    assert codes(model, batch_size=32) == [], "no average, no momentum"


def test_statistics_that_stand_still_while_the_batch_normalises():
    model = trained()
    model.bn1.track_running_stats = False  # as Lightning's BaseFinetuning.freeze leaves it
    assert found("BN214", model).layers == ("bn1",)
    model.bn1.eval()
    assert codes(model) == []


def test_a_frozen_backbone_whose_statistics_move():
    model = trained()
    for module in (model.conv1, model.bn1):
        module.requires_grad_(False)
    assert found("BN215", model).layers == ("bn1",)
    model.bn1.eval()
    assert codes(model) == []


def test_a_frozen_affine_behind_weights_that_learn_is_no_finding():
    model = trained()
    model.bn1.requires_grad_(False)
    model.bn2.requires_grad_(False)
    assert codes(model) == []
    assert codes(trained().requires_grad_(False)) == [], "nothing at all is trained"


# --- BN3xx: the network


class Functional(Net):
    def forward(self, x):
        x = F.dropout(self.bn1(self.conv1(x)).relu(), 0.4, self.training)
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


class Untraceable(Net):
    def forward(self, x):
        if x.sum() > 1e9:  # torch.fx cannot know
            raise ValueError("too large")
        return super().forward(x)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("model", [Net(dropout_before=0.3), Functional()], ids=["module", "function"])
def test_dropout_before_batch_norm(model, sample):
    finding = found("BN301", model, **({"sample": images()} if sample else {}))
    assert finding.layers == ("bn2",)
    assert ("times the variance" in finding.message) == sample


def test_the_effect_of_dropout_is_measured_in_a_model_that_cannot_be_traced():
    model = Untraceable(dropout_before=0.3)
    assert codes(model) == [], "unknown, and not guessed"
    assert codes(model, sample=images()) == ["BN301"]


def test_the_variance_that_dropout_adds_is_the_papers():
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(16)

        def forward(self, x):
            return self.bn(self.dropout(x))

    finding = found("BN301", After(), sample=torch.randn(20_000, 16))
    assert "2 times the variance" in finding.message  # E[x²] / (1 - p) of a standard normal, p = 0.5


@pytest.mark.parametrize("spec", [norms.Group(4), norms.Frozen()])
def test_dropout_does_not_matter_to_layers_whose_statistics_do_not_learn_it(spec):
    model = trained(Net(dropout_before=0.3))
    bnkit.swap(model, spec)
    assert "BN301" not in codes(model, sample=images())
    assert "BN301" not in codes(model)


def test_a_bias_that_batch_norm_takes_off():
    assert found("BN302", Net(bias=True)).layers == ("bn1", "bn2")
    assert codes(Untraceable(bias=True)) == []


def test_a_bias_that_counts_is_no_finding():
    class Branch(Net):
        def forward(self, x):
            x = self.conv1(x)
            y = self.bn2(self.conv2(self.bn1(x).relu() + x))
            return self.head(y.mean((2, 3)))

    assert found("BN302", Branch(bias=True)).layers == ("bn2",), "conv1's bias goes past bn1 too"
    for spec in (norms.Frozen(), norms.Group(4)):
        model = trained(Net(bias=True))
        bnkit.swap(model, spec)
        assert codes(model) == []


class Shared(nn.Module):
    """One head over two levels of a pyramid."""

    def __init__(self, offset):
        super().__init__()
        self.conv, self.bn, self.offset = nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8), offset

    def forward(self, x):
        return self.bn(self.conv(x)).mean() + self.bn(self.conv(F.avg_pool2d(x, 2) + self.offset)).mean()


def test_a_shared_layer_is_told_where_its_calls_differ():
    finding = found("BN303", Shared(GAIN), sample=images())
    assert finding.layers == ("bn",)
    assert "called 2 times" in finding.message
    assert codes(Shared(0.0), sample=images()) == []
    model = Shared(GAIN)
    bnkit.swap(model, norms.Group(4))
    assert codes(model, sample=images()) == []


def test_layers_that_no_forward_reaches():
    class Spare(Net):
        def __init__(self):
            super().__init__()
            self.spare, self.auxiliary = nn.BatchNorm2d(8), nn.BatchNorm2d(2)

        def forward(self, x):
            return super().forward(self.auxiliary(x) if self.training else x)

    assert codes(Spare()) == []
    assert found("BN304", Spare(), sample=images()).layers == ("spare",), "the auxiliary one is reached in training"


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_class_that_is_not_known(monkeypatch):
    model = Net()
    model.bn1 = Rectified(8)
    assert found("BN305", model).layers == ("bn1",)
    monkeypatch.setattr("bnkit.norms.adapters._KINDS", dict(norms.adapters._KINDS))
    bnkit.register_adapter(Rectified, after=lambda layer, y: y.relu())
    assert codes(model) == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to move the model to")
def test_torchs_synchronized_layers_refuse_the_cpu():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    assert codes(model) == ["BN306"]
    assert codes(model.eval()) == [], "inference works"


# --- BN4xx: the optimizer


def test_weight_decay_on_batch_norm():
    model = Net()
    bn = [p for layer in (model.bn1, model.bn2) for p in layer.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in bn)]
    assert codes(model, optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.01)) == ["BN401"]
    groups = [{"params": others}, {"params": bn, "weight_decay": 0}]  # as the cure says
    assert codes(model, optimizer=torch.optim.AdamW(groups, weight_decay=0.01)) == []


def test_parameters_that_no_optimizer_has():
    model = Net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.conv1, model.bn1, model.conv2, model.head)]
    assert found("BN402", model, optimizer=optimizers).layers == ("bn2",)
    model.bn2.requires_grad_(False)
    assert codes(model, optimizer=iter(optimizers)) == []


def test_averaged_weights_want_statistics_of_their_own():
    model = trained()
    for use_buffers, code in ((False, "BN403"), (True, "BN404")):
        average = AveragedModel(model, use_buffers=use_buffers)
        assert codes(average) == [], "nothing has been averaged"
        average.update_parameters(model)
        assert codes(average) == [code]
        assert codes(average, recalibrates=True) == []
        assert codes(average, sample=images()) == [], "they fit, as the sample tells"
        assert codes(model, averages=[average]) == [code]


# --- BN5xx: measured


def test_statistics_that_are_off_are_told_and_recalibration_cures_it():
    model = trained()
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    finding = found("BN501", model, sample=images())
    assert "bn1" in finding.layers
    bnkit.recalibrate(model, [images() for _ in range(20)])
    assert codes(model, sample=images()) == []


def test_a_sample_of_other_data_is_told_from_one_of_the_same():
    model = trained()
    assert "BN501" in codes(model, sample=images() + GAIN)
    assert codes(model, sample=images()) == []


def test_frozen_statistics_that_are_off_have_another_cure():
    model = trained()
    bnkit.swap(model, {"bn1": norms.Frozen()})
    with torch.no_grad():
        model.conv1.weight.mul_(3)
    findings = [finding for finding in bnkit.diagnose(model, sample=images()) if finding.code == "BN501"]
    assert [finding.layers for finding in findings] == [("bn2",), ("bn1",)], "bn2 learnt under bn1 as it was"
    assert "BatchNormRecalibration" in findings[0].cure
    assert "before freezing" in findings[1].cure


@pytest.mark.parametrize("samples", [8, 16, 64])
@pytest.mark.parametrize("small", [2, 32])
def test_a_sample_of_the_same_data_never_cries_wolf(samples, small):
    model = trained(data=lambda: images(small))
    alarms = [code for _ in range(40) for code in codes(model, sample=images(samples)) if code.startswith("BN5")]
    assert alarms == []


def test_the_train_eval_gap_is_told_as_what_it_changes():
    model = trained()
    model.head.weight.data.mul_(20)  # predictions that depend on the image
    assert codes(model, sample=images(256)) == []
    model.bn2.running_mean.add_(torch.randn(8))
    finding = found("BN502", model, sample=images(256))
    assert finding.layers == ()
    changed = bnkit.probes.train_eval_gap(model, images(256)).disagreement
    told = float(finding.message.split("%")[0]) / 100
    assert told == pytest.approx(changed, abs=0.1)


def test_the_gap_of_an_output_that_has_no_predictions():
    class Regression(Net):
        def forward(self, x):
            return super().forward(x)[:, 0]

    model = trained(Regression())
    assert codes(model, sample=images(64)) == []
    model.bn2.running_mean.sub_(2 * GAIN)
    assert "of its size" in found("BN502", model, sample=images(64)).message


# --- the list itself


def test_every_code_has_a_test_that_names_it():
    text = open(__file__, encoding="utf-8").read()  # noqa: SIM115
    assert [code for code in CODES if f'"{code}"' not in text] == []
