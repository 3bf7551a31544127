"""Networks of the kinds that people use: recalibrated, observed, monitored, swapped, reverted and diagnosed, each."""

import copy
import math
import re
from fnmatch import fnmatchcase

import pytest
import torch
from helpers.models import CASES, Case, lazy, plain
from helpers.references import assert_same, population, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import bnkit
from bnkit.norms import Domain, Frozen, Ghost, Group, MovingAverage, NormBatch, Renorm, Sync, spec_of

SPECS = {
    "ghost": Ghost(2),
    "frozen": Frozen(),
    "group": Group(2),
    "renorm": Renorm(warmup_steps=0),
    "sync": Sync(),
    "norm_batch": NormBatch(3),
    "moving_average": MovingAverage(4, warmup_steps=1, renorm_steps=2),
    "domain": Domain(("photo", "sketch")),
}
# Those whose inference is another by design; see their warnings.
INFERS_OTHERWISE = ("group", "moving_average")
# What rounding to the running statistics' own dtype leaves of the float64 reference.
PRECISION = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2**-8}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_case_that_trains = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.twin is None]
)
every_spec = pytest.mark.parametrize("kind", SPECS)

VERBS = {
    "recalibrate": lambda model: bnkit.recalibrate(model, [torch.randn(6, 2, 8, 8)]),
    "observe": lambda model: bnkit.observe(model).__enter__(),
    "monitor": lambda model: bnkit.Monitor(model),
    "swap": lambda model: bnkit.swap(model, Ghost(2)),
    "revert": lambda model: bnkit.revert(model),
    "diagnose": lambda model: bnkit.diagnose(model),
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


def layers_of(model):
    """The BatchNorm layers by name, found by this test's own means."""
    model = getattr(model, "_orig_mod", model)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def feed(model, batch):
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple) else batch)


class Inputs:
    """Everything that each layer is given inside the block, taken by hooks."""

    def __init__(self, model):
        self.layers, self.seen, self.handles = layers_of(model), {}, []

    def __enter__(self):
        for name, layer in self.layers.items():
            keep = lambda _, args, name=name: self.seen.setdefault(name, []).append(args[0].detach().double())  # noqa: E731
            self.handles.append(layer.register_forward_pre_hook(keep))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def populations(self):
        """Layer -> mean and biased variance of all of it, in float64."""
        flat = {
            name: torch.cat([x.movedim(1, -1).reshape(-1, x.shape[1]) for x in calls])
            for name, calls in self.seen.items()
        }
        return {name: (*population(rows), len(rows)) for name, rows in flat.items()}


def reference(case: Case):
    """What the layers that are to be recalibrated normalise in training mode, over all the data."""
    torch.manual_seed(0)
    model = (case.twin or case.build)()
    model = getattr(model, "_orig_mod", model)
    targets = [layer for layer in layers_of(model).values() if layer.training]
    model.eval()  # only BatchNorm trains in a recalibration: dropout and a spectral norm's iteration stand still
    for layer in targets:
        layer.training = True
    with torch.no_grad(), Inputs(model) as inputs:
        for batch in case.batches():
            feed(model, batch)
    return inputs.populations()


def build(case: Case):
    torch.manual_seed(0)
    return case.build()


@every_case
def test_recalibrated_statistics_are_those_of_all_the_data(case):
    model, expected = build(case), reference(case)
    before = snapshot(model)
    report = bnkit.recalibrate(model, case.batches())
    layers = layers_of(model)
    assert report.samples == 18
    assert report.layers.keys() | report.kept.keys() == layers.keys(), "each layer is recalibrated, or named as kept"
    assert {name: why in report.kept[name] for name, why in case.kept.items()} == dict.fromkeys(report.kept, True)
    for name in report.layers:
        mean, var, _ = expected[name]
        tolerance = PRECISION[layers[name].running_var.dtype]
        found = layers[name].running_mean.double(), layers[name].running_var.double()
        assert ((found[0] - mean).abs() / var.sqrt()).max() < tolerance * (1 + (mean / var.sqrt()).abs().max()), name
        torch.testing.assert_close(found[1], var, rtol=tolerance, atol=0)
    assert_same(before, snapshot(model), except_running=[_registered(model, name) for name in report.layers])


def _registered(model, name):
    return f"_orig_mod.{name}" if hasattr(model, "_orig_mod") else name


@every_case
def test_observed_moments_are_those_of_what_each_layer_was_given(case):
    model = build(case).train(case.twin is None)
    with Inputs(model) as inputs, bnkit.observe(model) as seen:
        for batch in case.batches():
            feed(model, batch)
    expected = inputs.populations()
    unseen = {*case.unseen} if case.twin is None else set()
    assert set(seen.unseen) == unseen
    assert seen.keys() == expected.keys() == layers_of(model).keys() - unseen
    for name, (mean, var, count) in expected.items():
        assert seen[name].count == count, "what the backward pass repeats, or a call of a shared layer, counts once"
        assert ((seen[name].mean - mean).abs() / var.sqrt()).max() < 2e-6 * (1 + (mean / var.sqrt()).abs().max()), name
        torch.testing.assert_close(seen[name].var, var, rtol=2e-6, atol=0)


def train(case: Case, watch=None):
    """Three steps of SGD, and what they leave: the losses, parameters and buffers, and the next random number."""
    model = build(case).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []

    def step(batch):
        optimizer.zero_grad()
        loss = feed(model, batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    result = watch(model, step, case.batches()) if watch else [step(batch) for batch in case.batches()]
    return result, torch.stack(losses), model.state_dict(), torch.rand(1)


def observed(model, step, batches):
    with bnkit.observe(model) as seen:
        for batch in batches:
            step(batch)
    return seen


def monitored(model, step, batches):
    monitor = bnkit.Monitor(model, every_n_steps=len(batches), input_every_n_steps=1)
    for number, batch in enumerate(batches):
        monitor.before()
        step(batch)
        snapshot = monitor.after(number, samples=6)
    monitor.close()
    return snapshot


@every_case_that_trains
@pytest.mark.parametrize("watch", [observed, monitored])
def test_training_is_bit_identical_while_it_is_watched(case, watch):
    _, losses, state, random = train(case)
    _, watched_losses, watched_state, watched_random = train(case, watch)
    assert torch.equal(losses, watched_losses)
    assert torch.equal(random, watched_random)
    assert all(torch.equal(tensor, watched_state[name]) for name, tensor in state.items())


@every_case_that_trains
def test_the_monitor_sees_every_layer_or_says_that_it_does_not(case):
    snapshot, *_ = train(case, monitored)
    assert snapshot.layers.keys() == layers_of(build(case)).keys()
    for name, measures in snapshot.layers.items():
        if name in case.unseen:
            assert measures.source.startswith("unknown")
            assert math.isnan(measures.kl)
        else:
            assert measures.source in ("layer", "input")
            assert measures.finite
            assert math.isfinite(measures.kl)


@every_spec
@every_case
def test_a_swapped_model_works_and_reverts_to_what_it_was(case, kind):
    model, batches, spec = build(case), case.batches(), SPECS[kind]
    hooked = []
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda *_, name=name: hooked.append(name))
    before, held, aliases, output = *_state(model), _infer(model, batches[0])
    rules = {"*": spec}
    pattern, message = case.refused.get(kind, case.refused.get("*", (None, None)))
    if pattern is not None:
        with pytest.raises((TypeError, ValueError), match=message):
            bnkit.swap(model, spec, device_batch=6)
        assert_same(before, snapshot(model))
        rules = {pattern: None, "*": spec}
    if pattern == "*":
        return

    conversion = bnkit.swap(model, rules, device_batch=6)
    swapped = {name for name, layer in layers_of(model).items() if spec_of(layer) is not None}
    assert swapped == {name for name in layers_of(model) if pattern is None or not fnmatchcase(name, pattern)}
    assert sorted(conversion.revert()) == sorted(swapped)
    assert_same(before, snapshot(model))
    assert _aliases(model) == aliases

    bnkit.swap(model, rules, device_batch=6)
    keys = model.state_dict().keys()
    assert keys >= held.keys() if kind == "domain" else list(keys) == list(held)
    if kind not in INFERS_OTHERWISE:
        assert torch.equal(_infer(model, batches[0]), output), "a checkpoint belongs to the model, not to the variant"
    hooked.clear()
    model.train()
    for batch in batches:
        loss = feed(model, batch).square().mean()
        loss.backward()
        assert loss.isfinite()
    assert {*hooked} == layers_of(model).keys() - {*case.unseen}, "hooks of others fire as before"
    for name, layer in layers_of(model).items():
        if layer.weight.requires_grad and name not in case.unseen:
            assert layer.weight.grad.isfinite().all()

    assert sorted(bnkit.revert(model)) == sorted(swapped)
    model.load_state_dict(held, strict=True)
    assert_same(before, snapshot(model))
    assert _aliases(model) == aliases
    assert torch.equal(_infer(model, batches[0]), output)


def _state(model):
    return snapshot(model), copy.deepcopy(model.state_dict()), _aliases(model)


def _aliases(model):
    """Every name of every module and parameter, and what it is of."""
    return [(name, id(thing)) for name, thing in model.named_modules(remove_duplicate=False)] + [
        (name, id(thing)) for name, thing in model.named_parameters(remove_duplicate=False)
    ]


def _infer(model, batch):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        output = feed(model, batch)
    for module, mode in modes:
        module.training = mode
    return output


@every_case
def test_a_diagnosis_finds_what_is_there_and_changes_nothing(case):
    model = build(case)
    before, random = snapshot(model), torch.get_rng_state()
    findings = bnkit.diagnose(model, sample=case.batches()[1], batch_size=6)
    assert_same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    named = {name for finding in findings for name in finding.layers}
    assert named <= layers_of(model).keys()
    unreached = {name for finding in findings if finding.code == "BN304" for name in finding.layers}
    assert unreached == {*case.unseen}


def _lazy_state(model):
    names = {name: type(module) for name, module in model.named_modules()}
    return names, [(name, type(tensor)) for name, tensor in model.state_dict().items()], repr(model)


@every_verb
def test_a_lazy_layer_is_refused_until_a_forward_has_made_it(verb):
    model = lazy()
    before = _lazy_state(model)
    with pytest.raises(ValueError, match="lazy layer '1' has no channels yet: run one forward"):
        verb(model)
    assert _lazy_state(model) == before
    model(torch.randn(6, 2, 8, 8))
    verb(model)


@every_verb
@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(6, 2, 8, 8))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_scripted_model_is_refused_and_left_as_it_was(verb, how):
    model = how(plain())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match="scripted BatchNorm layer '1': hand over the model as it was before"):
        verb(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def parametrized_norm():
    """A BatchNorm layer that is itself parametrized, by which its class is another."""
    model = plain()
    parametrize.register_parametrization(model[1], "weight", Positive())
    return model


def test_a_parametrized_batch_norm_is_recalibrated_like_any_other():
    case = Case(parametrized_norm, CASES["compiled"].batches)
    test_recalibrated_statistics_are_those_of_all_the_data(case)
    test_observed_moments_are_those_of_what_each_layer_was_given(case)
    test_the_monitor_sees_every_layer_or_says_that_it_does_not(case)
    test_training_is_bit_identical_while_it_is_watched(case, monitored)
    test_a_diagnosis_finds_what_is_there_and_changes_nothing(case)


@every_spec
def test_a_parametrized_batch_norm_is_not_swapped_and_the_error_says_what_to_do(kind):
    model = parametrized_norm()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^1: .* parametrized \(weight\).* swap it first, .*remove_parametrizations"):
        bnkit.swap(model, SPECS[kind], device_batch=6)
    with pytest.raises(TypeError, match=r"parametrized \(weight\)"):
        SPECS[kind].check(model[1], bnkit.norms.Context(device_batch=6))
    assert_same(before, snapshot(model))
    assert bnkit.swap(model, {"*": SPECS["ghost"]}, on_unknown="skip").revert() == ["4"]
    parametrize.remove_parametrizations(model[1], "weight")
    bnkit.swap(model, SPECS["ghost"])
    assert bnkit.revert(model) == ["1", "4"]


def test_what_many_layers_are_refused_for_is_said_once():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain())
    with pytest.raises(TypeError) as refusal:
        bnkit.swap(model, Ghost(2))
    message = str(refusal.value)
    assert message.startswith("1, 4: ")
    assert len(re.findall("leave convert_sync_batchnorm out", message)) == 1
