import dataclasses
import inspect

import pytest
import torch
from torch import nn

from bnkit import norms
from bnkit.norms import Frozen, Ghost, Group, Spec, Sync, original_class, register_adapter, spec_of, undo
from bnkit.norms.adapters import _KINDS
from bnkit.norms.ghost import GhostBatchNorm2d


class Renamed(nn.BatchNorm2d):
    """Another library's layer whose forward is BatchNorm's own."""


@pytest.fixture
def registered():
    register_adapter(Renamed, nn.BatchNorm2d)
    yield
    del _KINDS[Renamed]


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_swapped_and_given_back():
    layer = Renamed(3)
    Ghost(2).apply(layer)
    assert isinstance(layer, nn.BatchNorm2d)
    assert original_class(layer) is Renamed
    undo(layer)
    assert type(layer) is Renamed


def test_a_kind_is_one_of_torchs_three():
    with pytest.raises(ValueError, match="A kind is"):
        register_adapter(Renamed, nn.SyncBatchNorm)


def test_torchs_own_synchronized_layer_is_named():
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        Ghost(2).apply(nn.SyncBatchNorm(3))


def test_a_chain_of_swaps_is_undone_at_once():
    layer = nn.BatchNorm2d(3)
    for spec in (Ghost(2), Frozen(False), Group(3), Sync()):
        spec.apply(layer)
        assert spec_of(layer) == spec
    assert undo(layer)
    assert type(layer) is nn.BatchNorm2d
    assert layer.track_running_stats
    assert layer.weight.requires_grad
    assert spec_of(layer) is None


def test_a_refused_swap_leaves_the_variant_that_was():
    layer = nn.BatchNorm2d(3)
    Ghost(2).apply(layer)
    with pytest.raises(TypeError):
        Group(3, weight_standardization=True).apply(layer)
    assert spec_of(layer) == Ghost(2)


def test_specs_are_frozen_dataclasses_of_plain_values():
    specs = [c for n, c in vars(norms).items() if inspect.isclass(c) and issubclass(c, Spec) and c is not Spec]
    assert len(specs) == 8
    for spec in specs:
        assert spec.__dataclass_params__.frozen
        fields = dataclasses.fields(spec)
        given = {"size": 4, "names": ("a",)}
        instance = spec(**{f.name: given[f.name] for f in fields if f.default is dataclasses.MISSING})
        assert spec(**dataclasses.asdict(instance)) == instance
        for part in ("Warning:", "Args:", "Source:", "nference"):
            assert part in spec.__doc__


def test_the_package_names_what_it_offers():
    assert norms.__all__ == sorted(norms.__all__)
    assert all(hasattr(norms, name) for name in norms.__all__)


def test_an_optimizer_goes_on_after_a_swap():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for spec in (Ghost(2), Group(1), None):
        if spec is None:
            undo(model[1])
        else:
            spec.apply(model[1])
        before = model[1].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mul(torch.rand(8, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, model[1].weight)
        assert optimizer.state[model[1].weight]


def test_a_variant_is_not_made_directly():
    with pytest.raises(RuntimeError, match="by its spec's apply"):
        GhostBatchNorm2d(3)(torch.randn(4, 3, 2, 2))
