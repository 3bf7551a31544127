import copy

import pytest
import torch
from torch import nn

from bnkit.norms import Domain, Ghost, domain, plain_state_dict, undo


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def swapped(names=("photo", "sketch", "paint")):
    torch.manual_seed(0)
    model = network()
    model(torch.randn(8, 2, 8, 8))
    for index in (1, 4):
        Domain(names).apply(model[index])
    return model


def test_each_domain_is_as_a_model_of_its_own():
    model = swapped()
    alone = {name: copy.deepcopy(model) for name in ("photo", "sketch")}
    batches = {"photo": torch.randn(8, 2, 8, 8) * 3 + 1, "sketch": torch.randn(8, 2, 8, 8) - 2}
    for _ in range(3):
        for name, batch in batches.items():
            with domain(model, name):
                assert torch.equal(model(batch), alone[name](batch))
    model.eval()
    for name, batch in batches.items():
        with domain(model, name):
            assert torch.equal(model(batch), alone[name].eval()(batch))
    assert torch.equal(model(batches["photo"]), alone["photo"](batches["photo"]))  # the first is the default


def test_the_domain_in_use_stands_under_batchnorms_names():
    model = swapped()
    layer = model[1]
    sketch = layer.running_mean_sketch
    with domain(model, "sketch"):
        assert layer.running_mean is sketch
        assert layer.domain == "sketch"
    assert layer.running_mean_sketch is sketch
    assert layer.domain == "photo"


def test_blocks_nest_and_survive_an_exception():
    model = swapped()
    with domain(model, "sketch"):
        with pytest.raises(KeyboardInterrupt), domain(model, "paint"):
            raise KeyboardInterrupt
        assert model[1].domain == "sketch"
    assert model[1].domain == model[4].domain == "photo"


@pytest.mark.parametrize("name", ["photo", "sketch"])
def test_a_checkpoint_means_the_same_in_and_outside_a_block(name):
    model = swapped()
    with domain(model, "sketch"):
        model(torch.randn(8, 2, 8, 8) + 5)
    outside = copy.deepcopy(model.state_dict())
    with domain(model, name):
        inside = model.state_dict()
        assert all(torch.equal(outside[key], value) for key, value in inside.items())
        other = swapped()
        with domain(other, name):
            other.load_state_dict(inside)
    assert all(torch.equal(outside[key], value) for key, value in other.state_dict().items())
    extra = {"running_mean_sketch", "running_var_sketch", "num_batches_tracked_sketch"}
    assert extra < {key.split(".")[-1] for key in outside}


def test_a_plain_checkpoint_loads_into_every_domain():
    plain, model = network(), swapped()
    plain(torch.randn(8, 2, 8, 8) * 2)
    state = plain.state_dict()
    keys = list(state)
    model.load_state_dict(state, strict=True)
    assert list(state) == keys
    plain.eval()
    model.eval()
    x = torch.randn(2, 2, 8, 8)
    for name in ("photo", "sketch", "paint"):
        with domain(model, name):
            assert torch.equal(model(x), plain(x))


def test_a_new_domain_starts_from_a_checkpoint_without_it():
    two, three = swapped(("photo", "sketch")), swapped()
    with domain(two, "sketch"):
        two(torch.randn(8, 2, 8, 8) + 5)
    three.load_state_dict(two.state_dict(), strict=True)
    assert torch.equal(three[1].running_mean_sketch, two[1].running_mean_sketch)
    assert torch.equal(three[1].running_mean_paint, two[1].running_mean)


@pytest.mark.parametrize("name", [None, "photo", "sketch"])
def test_one_domain_can_be_taken_out_as_a_plain_checkpoint(name):
    model, plain = swapped(), network()
    with domain(model, "sketch"):
        model(torch.randn(8, 2, 8, 8) + 5)
    plain.load_state_dict(plain_state_dict(model, name), strict=True)
    x = torch.randn(2, 2, 8, 8)
    with domain(model.eval(), name or "photo"):
        assert torch.equal(plain.eval()(x), model(x))


def test_an_unknown_domain_is_named():
    with pytest.raises(
        ValueError, match=r"no domain|No layer of the model has a domain 'adv'; there are: paint, photo"
    ):
        domain(swapped(), "adv").__enter__()
    with pytest.raises(ValueError, match="there are: none"):
        domain(network(), "adv").__enter__()


def test_undone_inside_a_block_the_first_domains_statistics_stay():
    model = swapped()
    photo = model[1].running_mean
    with domain(model, "sketch"):
        undo(model[1])
        Ghost(2).apply(model[4])
    assert model[1].running_mean is photo
    assert set(model.state_dict()) == set(network().state_dict())


def test_a_copy_made_in_a_block_keeps_its_domains_apart():
    model = swapped()
    with domain(model, "sketch"):
        model(torch.randn(8, 2, 8, 8) + 5)
        other = copy.deepcopy(model)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_names_may_come_as_a_list():
    assert Domain(["a", "b"]) == Domain(("a", "b"))


@pytest.mark.parametrize("names", ["photo", (), ("a", "a"), ("a", "not one"), (1, 2)])
def test_bad_names_are_said_in_one_sentence(names):
    with pytest.raises(ValueError, match="Domain's names are"):
        Domain(names)
