"""swap and revert: what changes, what does not, and what is refused."""

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from helpers.references import ConvNet, assert_same, inputs, snapshot
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import bnkit
from bnkit import norms
from bnkit.norms import (
    Domain,
    Frozen,
    Ghost,
    Group,
    MovingAverage,
    NormBatch,
    Renorm,
    Sync,
    original_class,
    plain_state_dict,
    spec_of,
)
from bnkit.norms.adapters import _KINDS
from bnkit.rules import parse_rules

SPECS = {
    "ghost": Ghost(2),
    "sync": Sync(),
    "norm_batch": NormBatch(4),
    "renorm": Renorm(warmup_steps=0),
    "frozen": Frozen(),
    "frozen_affine": Frozen(affine=False),
    "domain": Domain(("photo", "sketch")),
    "group": Group(3),
    "group_ws": Group(3, weight_standardization=True),
    "moving_average": MovingAverage(4, warmup_steps=1, renorm_steps=2),
}
BATCH_INFERENCE = [name for name in SPECS if not name.startswith("group")]
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def swap(model, rules, **options):
    return bnkit.swap(model, rules, device_batch=8, **options)


def train(model, optimizer=None, steps=3):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in inputs(batches=steps):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    return optimizer


# --- rules


def test_the_first_pattern_that_matches_wins_and_none_leaves_alone():
    model = ConvNet()
    conversion = swap(model, {"bn2": None, "bn*": Ghost(2)})
    assert spec_of(model.bn1) == Ghost(2)
    assert type(model.bn2) is nn.BatchNorm2d
    assert conversion.layers["bn1"].pattern == "bn*"
    assert conversion.layers["bn2"].rule is None


def test_patterns_are_on_the_qualified_name():
    model = nn.ModuleDict({"a": ConvNet(), "b": ConvNet()})
    swap(model, {"b.*1": Ghost(2)})
    assert [name for name, layer in model.named_modules() if spec_of(layer)] == ["b.bn1"]


def test_a_pattern_that_matches_nothing_is_named_with_names_near_it():
    with pytest.warns(UserWarning, match=r"'bn3' matches no BatchNorm layer.*'bn2', 'bn1'") as caught:
        swap(ConvNet(), {"bn3": Ghost(2), "*": Ghost(2)})
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_pattern_behind_another_is_named():
    with pytest.warns(UserWarning, match="'bn1' is never reached"):
        swap(ConvNet(), {"*": Ghost(2), "bn1": Frozen()})


def test_a_model_without_batch_norm_is_told_so():
    with pytest.warns(UserWarning, match="no BatchNorm layers"):
        conversion = swap(nn.Linear(2, 2), Ghost(2))
    assert "0 of 0 layers" in conversion.table()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("Ghost(2)", "one spec, or a dict"),
        (Ghost, "the class Ghost"),
        ({"*": Ghost}, "spec such as"),
        ({1: Ghost(2)}, "pattern is a string"),
        (None, "one spec"),
    ],
)
def test_rules_that_are_none_are_refused(rules, message):
    with pytest.raises(TypeError, match=message):
        swap(ConvNet(), rules)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Ghost(2), {"*": Ghost(2)}),
        ("Ghost(2)", {"*": Ghost(2)}),
        ("bnkit.norms.Frozen", {"*": Frozen()}),
        (repr(Ghost(2, "contiguous")), {"*": Ghost(2, "contiguous")}),
        (repr(Domain(("a", "b"))), {"*": Domain(("a", "b"))}),
        ({"_target_": "bnkit.norms.Sync", "group_size": 2}, {"*": Sync(2)}),
        ({"class_path": "bnkit.norms.Ghost", "init_args": {"size": 3}}, {"*": Ghost(3)}),
        ({"a*": "Group(2)", "b": "None", "c": None}, {"a*": Group(2), "b": None, "c": None}),
        (None, None),
        ("None", None),
    ],
)
def test_rules_can_be_said_in_a_config_file(value, expected):
    assert parse_rules(value) == expected


@pytest.mark.parametrize(
    "value", ["Goat(2)", "Ghost(", "os.system('x')", {"_target_": "torch.nn.Linear"}, "Ghost(1+x)", "nowhere.Ghost(2)"]
)
def test_what_is_not_a_spec_is_refused_and_not_run(value):
    with pytest.raises(ValueError, match="not a spec"):
        parse_rules(value)


# --- what does not change


@every_spec
def test_parameters_buffers_hooks_and_modes_are_the_same_objects(spec):
    model = ConvNet()
    model.bn1.register_forward_hook(lambda *_: None)
    model.bn1.eval()
    model.bn2.momentum, model.bn2.eps = 0.02, 1e-3
    before = snapshot(model)
    swap(model, spec)
    after = snapshot(model)
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value)
    bnkit.revert(model)
    assert_same(before, snapshot(model))
    assert vars(model.bn1).keys() == vars(nn.BatchNorm2d(6)).keys()


@every_spec
def test_hooks_go_on_firing(spec):
    model, fired = ConvNet(), []
    model.bn1.register_forward_hook(lambda *_: fired.append("forward"))
    model.bn1.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.bn1.register_full_backward_hook(lambda *_: fired.append("backward"))
    swap(model, spec)
    model(inputs()[0]).sum().backward()
    assert fired == ["pre", "forward", "backward"]


@every_spec
def test_a_layer_used_twice_is_one_layer(spec):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
            self.b = self.a

        def forward(self, x):
            return self.a(self.conv(x)) + self.b(self.conv(x))

    model = Twice()
    conversion = swap(model, spec)
    assert list(conversion.layers) == ["a"]
    assert model.a is model.b
    assert model(inputs()[0]).isfinite().all()
    assert conversion.revert() == ["a"]
    assert type(model.b) is nn.BatchNorm2d


@every_spec
def test_an_optimizer_from_before_the_swap_goes_on(spec):
    model = ConvNet()
    optimizer = train(model)
    momenta = {p: state["momentum_buffer"] for p, state in optimizer.state.items()}
    swap(model, spec)
    assert all(optimizer.state[p]["momentum_buffer"] is buffer for p, buffer in momenta.items())
    learning = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    learning = {name: value for name, value in learning.items() if not re.match("conv.*bias", name)}  # BN takes it off
    train(model, optimizer)
    assert all(not torch.equal(p, learning[n]) for n, p in model.named_parameters() if n in learning)


def test_frozen_parameters_stay_frozen():
    model = ConvNet()
    model.bn1.weight.requires_grad_(False)
    swap(model, Frozen(affine=False))
    assert not model.bn1.bias.requires_grad
    bnkit.revert(model)
    assert not model.bn1.weight.requires_grad
    assert model.bn1.bias.requires_grad


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm])
def test_parametrized_convolutions_are_left_as_they_are(parametrization):
    model = ConvNet()
    parametrization(model.conv1)
    swap(model, Ghost(2))
    train(model)
    assert parametrize.is_parametrized(model.conv1)
    bnkit.revert(model)
    with pytest.raises(TypeError, match=r"^bn1: .*ParametrizedConv2d"):
        swap(model, MovingAverage())


def test_memory_format_dtype_and_device_are_kept():
    model = ConvNet().double().to(memory_format=torch.channels_last)
    swap(model, Ghost(2))
    x = inputs()[0].double().to(memory_format=torch.channels_last)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.bn1(model.conv1(x)).is_contiguous(memory_format=torch.channels_last)
    assert model(x).dtype == torch.float64


# --- state_dict, deepcopy, pickle


@every_spec
def test_state_dicts_load_both_ways_strictly(spec):
    plain, swapped = ConvNet(), ConvNet()
    train(plain)
    swap(swapped, spec)
    swapped.load_state_dict(plain.state_dict(), strict=True)
    back = ConvNet()
    back.load_state_dict(plain_state_dict(swapped), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), back.state_dict().values(), strict=True))
    if type(spec) is not Domain:
        assert swapped.state_dict().keys() == plain.state_dict().keys()


@every_spec
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_can_be_reverted(spec, how):
    model = ConvNet()
    swap(model, spec)
    train(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    x = inputs()[0]
    assert torch.equal(model.eval()(x), twin.eval()(x))
    bnkit.revert(twin)
    assert type(twin.bn1) is nn.BatchNorm2d
    assert type(twin.conv1) is nn.Conv2d
    assert spec_of(model.bn1) == (Ghost(4) if type(spec) is NormBatch else spec)


# --- revert


@pytest.mark.parametrize("name", BATCH_INFERENCE)
def test_a_reverted_model_gives_the_same_outputs_bit_for_bit(name):
    model = ConvNet()
    swap(model, SPECS[name])
    train(model)
    x = inputs()[0]
    with torch.no_grad():
        expected = model.eval()(x)
        assert bnkit.revert(model) == ["bn1", "bn2"]
        assert torch.equal(model(x), expected)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "helpers"}
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    fused = torch.nn.utils.fuse_conv_bn_eval(model.conv1, model.bn1)
    torch.testing.assert_close(fused(x), model.bn1(model.conv1(x)), rtol=1e-4, atol=1e-5)


@every_spec
def test_a_reverted_model_is_loaded_where_bnkit_is_not_imported(spec, tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 3))
    swap(model, spec)
    train(model)
    bnkit.revert(model)
    model.eval()
    torch.save((model, inputs()[0], model(inputs(1)[0]).shape), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        f"model, x, shape = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert model(x).shape == shape and type(model[1]) is torch.nn.BatchNorm2d\n"
        "assert not any(name.startswith('bnkit') for name in sys.modules)\n"
    )
    if type(spec) is Ghost or type(spec) is MovingAverage:  # a process costs seconds: the two that differ most
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=_environment(), timeout=100)
    assert b"bnkit" not in pickle.dumps(model)


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def test_a_conversion_reverts_what_it_swapped_and_nothing_else():
    model = ConvNet()
    first = swap(model, {"bn1": Ghost(2)})
    second = swap(model, {"bn2": Frozen()})
    assert second.revert() == ["bn2"]
    assert spec_of(model.bn1) == Ghost(2)
    assert first.revert() == ["bn1"]
    assert first.revert() == []
    assert bnkit.revert(model) == []


def test_swapping_a_swapped_model_begins_with_the_original_class():
    model = ConvNet()
    swap(model, Ghost(2))
    conversion = swap(model, Frozen(affine=False))
    assert conversion.layers["bn1"].before == Ghost(2)
    assert original_class(model.bn1) is nn.BatchNorm2d
    assert spec_of(model.bn1) == Frozen(affine=False)
    conversion.revert()
    assert type(model.bn1) is nn.BatchNorm2d
    assert model.bn1.weight.requires_grad


def test_swapping_twice_keeps_what_the_layers_remember():
    model = ConvNet()
    swap(model, Renorm())
    train(model, steps=3)
    conversion = swap(model, Renorm())
    assert model.bn1.step == 3
    assert not any(layer.changed for layer in conversion.layers.values())
    swap(model, Renorm(r_max=2.0))
    assert model.bn1.step == 0


def test_a_norm_batch_of_the_devices_batch_is_plain_again():
    model = ConvNet()
    swap(model, Ghost(2))
    conversion = swap(model, NormBatch(8))
    assert type(model.bn1) is nn.BatchNorm2d
    assert conversion.layers["bn1"].after is None


# --- all or nothing


def test_a_refusal_names_the_layer_and_changes_nothing():
    model = ConvNet()
    model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^bn2: .*track_running_stats=True"):
        swap(model, Renorm())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("before", [None, "ghost", "moving_average", "domain", "frozen_affine", "group_ws"])
@pytest.mark.parametrize("after", ["renorm", "moving_average", "frozen_affine", "group_ws", "domain"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_swap_that_fails_half_way_is_undone(monkeypatch, before, after, error):
    if before == after:
        pytest.skip("stays as it is")
    model = ConvNet()
    if before:
        swap(model, SPECS[before])
        train(model)
    state, twin = snapshot(model), copy.deepcopy(model)
    attach, layers = type(SPECS[after]).attach, []

    def fails_at_the_second(self, layer, context):
        layers.append(layer)
        if len(layers) == 2:
            raise error("out of memory")
        return attach(self, layer, context)

    monkeypatch.setattr(type(SPECS[after]), "attach", fails_at_the_second)
    with pytest.raises(error):
        swap(model, SPECS[after])
    assert_same(state, snapshot(model))
    monkeypatch.undo()
    assert spec_of(model.bn1) == (SPECS[before] if before else None)
    requires = [p.requires_grad for p in twin.parameters()]
    assert [p.requires_grad for p in model.parameters()] == requires
    x = inputs()[0]
    assert torch.equal(model.train()(x), twin.train()(x))
    bnkit.revert(model)
    assert type(model.conv1) is nn.Conv2d


def test_a_dry_run_changes_nothing_and_says_what_would():
    model = ConvNet()
    before = snapshot(model)
    conversion = swap(model, {"bn1": NormBatch(4), "*": None}, dry_run=True)
    assert_same(before, snapshot(model))
    assert conversion.revert() == []
    assert conversion.layers["bn1"].after == Ghost(4)
    with pytest.raises(ValueError, match=r"^bn1: .*larger batch"):
        swap(model, NormBatch(99), dry_run=True)


def test_the_table_shows_layer_from_to_and_rule():
    model = ConvNet()
    swap(model, {"bn2": Frozen()})
    table = swap(model, {"bn1": NormBatch(4), "*2": Frozen()}).table()
    header, _, first, second, plan, closing = table.splitlines()
    assert header.split() == ["layer", "from", "to", "rule"]
    assert re.split(r"  +", first) == [
        "bn1",
        "BatchNorm2d",
        "Ghost(size=4, grouping='strided')",
        "bn1: NormBatch(size=4, rounding='error')",
    ]
    assert re.split(r"  +", second) == ["bn2", "Frozen(affine=True)", "the same", "*2: Frozen(affine=True)"]
    assert "ghosts of 4 samples" in plan
    assert closing == "1 of 2 layers were swapped"


def test_the_world_size_is_given_or_that_of_the_process_group():
    model = ConvNet()
    with pytest.raises(ValueError, match="larger batch"):
        swap(model, NormBatch(16))
    swap(model, NormBatch(16), world_size=4)
    assert spec_of(model.bn1) == Sync(2)
    with pytest.raises(ValueError, match="give it as device_batch"):
        bnkit.swap(model, NormBatch(16))


# --- classes that are not torch's own


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it: the normalization and the activation in one layer."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(x)


def act(layer, y):
    return layer.act(y)


@pytest.fixture
def adapter():
    bnkit.register_adapter(BatchNormAct2d, after=act)
    yield
    del _KINDS[BatchNormAct2d]


def _with_act():
    return nn.Sequential(nn.Conv2d(2, 6, 3), BatchNormAct2d(6), nn.BatchNorm2d(6))


def test_an_unknown_class_is_named_and_nothing_is_swapped():
    model = _with_act()
    with pytest.raises(TypeError, match=r"^1: .*BatchNormAct2d.*register_adapter"):
        swap(model, Ghost(2))
    assert type(model[2]) is nn.BatchNorm2d
    swap(model, {"2": Ghost(2)})  # no rule is for it
    assert type(model[1]) is BatchNormAct2d


def test_an_unknown_class_can_be_skipped_and_the_table_says_so():
    model = _with_act()
    conversion = swap(model, Ghost(2), on_unknown="skip")
    assert type(model[1]) is BatchNormAct2d
    assert spec_of(model[2]) == Ghost(2)
    assert "skipped" in conversion.table().splitlines()[2]
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        swap(model, Ghost(2), on_unknown="ignore")


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_registered_class_is_swapped_with_what_it_does_beside(compiled):
    model, reference = _with_act()[:2], nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    reference.load_state_dict(model.state_dict())
    run = torch.compile(model, backend="eager") if compiled else model
    x = inputs()[0]
    run(x)
    model.load_state_dict(reference.state_dict())
    swap(model, Ghost(2))
    swap(reference, Ghost(2))
    torch.testing.assert_close(run(x), reference(x))  # compiled, ghosts are computed by other operations
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.eval()(x), reference.eval()(x))
        assert bnkit.revert(twin) == ["1"]
        assert type(twin[1]) is BatchNormAct2d
    bnkit.revert(model)
    bnkit.revert(reference.train())
    assert type(model[1]) is BatchNormAct2d
    torch.testing.assert_close(run(x), reference(x))


def test_a_pickle_that_needs_an_adapter_says_so():
    bnkit.register_adapter(BatchNormAct2d, after=act)
    model = _with_act()
    swap(model, Ghost(2))
    data = pickle.dumps(model)
    del _KINDS[BatchNormAct2d]
    with pytest.raises(TypeError, match=r"BatchNormAct2d.*register_adapter"):
        pickle.loads(data)


def test_torchs_synchronized_layer_is_refused_with_the_cure_or_registered():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet())
    with pytest.raises(TypeError, match=r"Sync\(\)") as caught:
        swap(model, Ghost(2))
    assert str(caught.value).startswith("bn1, bn2: ")
    bnkit.register_adapter(nn.SyncBatchNorm, nn.BatchNorm2d)
    try:
        swap(model, Ghost(2))
        assert model(inputs()[0]).shape == (8, 3)
        bnkit.revert(model)
        assert type(model.bn1) is nn.SyncBatchNorm
    finally:
        del _KINDS[nn.SyncBatchNorm]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.InstanceNorm2d,), TypeError, "subclass of torch's BatchNorm"),
        ((nn.SyncBatchNorm,), ValueError, "say which"),
        ((BatchNormAct2d, nn.SyncBatchNorm), ValueError, "A kind is"),
    ],
)
def test_an_adapter_for_another_class_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        bnkit.register_adapter(*arguments)


def test_other_normalizations_are_not_touched():
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.GroupNorm(1, 2), nn.BatchNorm2d(2))
    assert list(swap(model, Ghost(2)).layers) == ["2"]
    assert type(model[0]) is nn.InstanceNorm2d


# --- the convolution before a layer

NEEDING = [SPECS["group_ws"], SPECS["moving_average"]]


class PreActivation(nn.Module):
    """Registered convolution first, and called norm first: the order of registration would mislead."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(y).relu())


@pytest.mark.parametrize("spec", NEEDING)
def test_the_convolution_is_found_in_the_data_flow(spec):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Identity(), PreActivation())
    swap(model, {"2.bn2": spec})
    assert type(model[2].conv1) is not nn.Conv2d
    assert type(model[2].conv2) is nn.Conv2d
    with pytest.raises(ValueError, match=r"'2\.bn1' cannot be known.*other operations use too.*convolutions="):
        swap(model, {"2.bn1": spec})
    assert type(model[2].bn1) is nn.BatchNorm2d


@pytest.mark.parametrize("spec", NEEDING)
def test_a_model_that_cannot_be_traced_is_traced_in_parts(spec):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ConvNet()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            return self.bn(self.block(x))

    model = Branching()
    swap(model, {"block.*": spec})
    assert type(model.block.conv2) is not nn.Conv2d
    with pytest.raises(ValueError, match=r"'bn' cannot be known \(torch\.fx cannot trace Branching"):
        swap(model, {"bn": spec})
    swap(model, {"bn": Group(1, weight_standardization=True)}, convolutions={"bn": "block.head"})
    assert type(model.block.head) is not nn.Linear
    assert sorted(bnkit.revert(model)) == ["block.bn1", "block.bn2", "bn"]
    assert type(model.block.head) is nn.Linear


def test_names_of_convolutions_are_checked():
    with pytest.raises(ValueError, match="no module 'conv9'"):
        swap(ConvNet(), MovingAverage(), convolutions={"bn1": "conv9"})
    with pytest.raises(ValueError, match="no BatchNorm layer 'bn9'"):
        swap(ConvNet(), MovingAverage(), convolutions={"bn9": "conv1"})
    with pytest.raises(TypeError, match=r"^bn1: .*Dropout"):
        swap(ConvNet(), MovingAverage(), convolutions={"bn1": "drop"})


def test_a_layer_behind_another_operation_is_refused():
    class Between(ConvNet):
        def forward(self, x):
            return self.bn1(self.conv1(x) * 2)

    with pytest.raises(ValueError, match=r"'bn1' cannot be known \(its input is the output of mul"):
        swap(Between(), {"bn1": MovingAverage()})


def test_finding_runs_no_hooks_and_moves_no_state():
    class Counting(ConvNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = None

        def forward(self, x):
            self.calls += 1
            self.seen = x
            return super().forward(x + torch.rand(()))

    model, fired = Counting(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    before, state = snapshot(model), torch.get_rng_state()
    swap(model, MovingAverage(), dry_run=True)
    assert_same(before, snapshot(model))
    assert fired == []
    assert model.seen is None
    assert torch.equal(torch.get_rng_state(), state)


# --- compile, wrappers


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["ghost", "renorm", "frozen", "group", "moving_average"])
def test_a_compiled_model_picks_the_swap_up(backend, name):
    torch.compiler.reset()
    model = ConvNet()
    twin = copy.deepcopy(model)
    x = inputs()[0]
    compiled = torch.compile(model, backend=backend)
    compiled(x), twin(x)
    for target in (compiled, twin):
        assert list(swap(target, SPECS[name]).layers) == ["bn1", "bn2"]
    torch.testing.assert_close(compiled(x), twin(x))
    again = torch.compile(model, backend=backend)
    torch.testing.assert_close(again(x), twin(x))
    for target in (compiled, twin):
        bnkit.revert(target)
    torch.testing.assert_close(compiled(x), twin(x))


def test_parts_that_are_compiled_have_the_same_names():
    model = nn.Sequential(ConvNet())
    model[0] = torch.compile(model[0], backend="eager")
    swap(model, {"0.bn1": MovingAverage()})
    assert list(bnkit.revert(model)) == ["0.bn1"]


def test_nothing_is_warned_of_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(ConvNet(), {"bn1": Ghost(2), "*": None})


# --- what a swap would change for others too


def test_a_convolution_of_two_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="2: its convolution is also that of 1"):
        bnkit.swap(model, norms.MovingAverage(), convolutions={"1": "0", "2": "0"})
    assert type(model[0]) is nn.Conv2d


def test_a_convolution_with_a_shared_weight_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="shares a parameter"):
        bnkit.swap(model, norms.Group(2, weight_standardization=True, fold=False))


def test_a_weight_that_a_hook_computes_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(TypeError, match="computed by a hook"):
        bnkit.swap(model, norms.MovingAverage())


def test_freezing_a_tied_parameter_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0: Frozen"):
        bnkit.swap(model, norms.Frozen(affine=False))
    bnkit.swap(model, norms.Frozen())
    assert model[0].weight.requires_grad


def test_a_layer_parametrized_after_its_swap_is_not_broken_by_a_revert():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    bnkit.swap(model, norms.Ghost(2))
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(TypeError, match="1 was parametrized"):
        bnkit.revert(model)
    assert type(model[0]).__name__ == "GhostBatchNorm1d"
    model(torch.randn(4, 3))
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert bnkit.revert(model) == ["0", "1"]


def test_domains_loaded_by_assignment_are_apart():
    model = nn.Sequential(nn.BatchNorm1d(3))
    plain = model.state_dict()
    bnkit.swap(model, norms.Domain(["a", "b"]))
    model.load_state_dict({name: value.clone() for name, value in plain.items()}, assign=True)
    with norms.domain(model, "b"):
        model(torch.randn(8, 3) + 5)
    assert not model[0].running_mean.any()
