"""Each claim runs in real processes; all claims of a world share its start."""

import copy
import os
import pickle
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnkit.norms import Context, Sync, pool_running_statistics, process_groups

SIZES = {"equal": [3, 3, 3, 3], "unequal": [5, 1, 2, 4], "empty": [4, 0, 3, 0], "one has all": [0, 6, 0, 0]}


def layers(shape, **settings):
    """The same trained layer twice: for this rank, synchronized, and for the whole batch, plain."""
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    plain = kind(shape[1], dtype=torch.float64, **settings)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(shape[1]) + 0.5)
    return copy.deepcopy(plain), plain


def summed(tensor, group=None):
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


def compare(synchronized, plain, sizes, shape, group=None, first=0, layout=torch.contiguous_format):
    """This rank's part against one process with the concatenated batch of its group."""
    rank = dist.get_rank() - first
    torch.manual_seed(1 + first)
    x = torch.randn(sum(sizes), *shape[1:], dtype=torch.float64) * 2 + 30
    upstream = torch.randn_like(x)
    mine = x.split(sizes)[rank].contiguous(memory_format=layout).clone().requires_grad_()
    whole = x.clone().requires_grad_()
    output, expected = synchronized(mine), plain(whole)
    output.backward(upstream.split(sizes)[rank])
    expected.backward(upstream)
    close = {"rtol": 1e-6, "atol": 1e-9}
    assert layout is torch.contiguous_format or output.is_contiguous(memory_format=layout)
    torch.testing.assert_close(output, expected.split(sizes)[rank], **close)
    torch.testing.assert_close(mine.grad, whole.grad.split(sizes)[rank], **close)
    for one, other in zip(synchronized.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(summed(one.grad, group), other.grad, **close)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synchronized.state_dict()[name], value, **close)


def claim_one_process_on_the_concatenated_batch(world):
    for sizes in SIZES.values():
        sizes = sizes[:world]
        for shape in ((0, 3), (0, 3, 4), (0, 3, 2, 5), (0, 3, 2, 3, 2)):
            for settings in ({}, {"affine": False}, {"momentum": None}, {"momentum": 1.0}):
                synchronized, plain = layers(shape, **settings)
                Sync().apply(synchronized)
                compare(synchronized, plain, sizes, shape)
                compare(synchronized, plain, sizes, shape)


def claim_channels_last_is_kept(world):
    shape = (0, 3, 4, 5)
    synchronized, plain = layers(shape)
    Sync().apply(synchronized)
    compare(synchronized, plain, SIZES["unequal"][:world], shape, layout=torch.channels_last)


def claim_sub_groups_are_each_one_process(world):
    shape = (0, 3, 2, 5)
    first = dist.get_rank() // 2 * 2
    for sizes in SIZES.values():
        if sum(sizes[first : first + 2]):
            synchronized, plain = layers(shape)
            Sync(2).apply(synchronized, Context(world_size=world))
            compare(synchronized, plain, sizes[first : first + 2], shape, process_groups.subgroup(2), first)
        else:  # a group without a sample at all: nothing to learn from
            synchronized, plain = layers(shape)
            Sync(2).apply(synchronized)
            assert synchronized(torch.empty(0, 3, 2, 5, dtype=torch.float64)).shape == (0, 3, 2, 5)
            torch.testing.assert_close(synchronized.running_mean, plain.running_mean)


def claim_sub_groups_statistics_are_pooled(world):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    Sync(2).apply(model[0])
    Sync().apply(model[1])
    group = dist.get_rank() // 2
    torch.manual_seed(group)
    x = torch.randn(4, 3, 5, 5) + 10 * group
    model[0](x)
    mine = model[0].running_var.clone()
    alone = copy.deepcopy(model[2].state_dict())
    pooled = pool_running_statistics(model)
    assert pooled == (1 if world > 2 else 0)
    assert all(torch.equal(alone[name], value) for name, value in model[2].state_dict().items())
    rows = [torch.empty(6) for _ in range(world)]
    dist.all_gather(rows, torch.cat([model[0].running_mean, model[0].running_var]))
    assert all(torch.equal(rows[0], row) for row in rows)  # the same bits everywhere
    if world > 2:
        assert (model[0].running_var > mine + 20).all()  # between two groups 10 apart: 25
    again = model[0].running_var.clone()
    pool_running_statistics(model)
    torch.testing.assert_close(model[0].running_var, again)


def claim_every_rank_has_the_same_bits(world):
    layer = nn.BatchNorm2d(5, momentum=1.0)
    Sync().apply(layer)
    torch.manual_seed(dist.get_rank())
    layer(torch.randn(3 + dist.get_rank(), 5, 7, 3) * 100 + 1000)
    rows = [torch.empty(10) for _ in range(world)]
    dist.all_gather(rows, torch.cat([layer.running_mean, layer.running_var]))
    assert all(torch.equal(rows[0], row) for row in rows)


def claim_one_collective_each_way(world):
    calls = []
    originals = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda *a, **k: (calls.append("gather"), originals[0](*a, **k))[1]
    dist.all_reduce = lambda *a, **k: (calls.append("reduce"), originals[1](*a, **k))[1]
    try:
        layer = nn.BatchNorm2d(3)
        Sync().apply(layer)
        output = layer(torch.randn(2, 3, 4, 4, requires_grad=True))
        assert calls == ["gather"]
        output.square().sum().backward()
        assert calls == ["gather", "reduce"]
        layer.eval()(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
        assert len(calls) == 2
    finally:
        dist.all_gather, dist.all_reduce = originals


def claim_groups_are_made_once_and_no_layer_holds_one(world):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    made = []
    original = dist.new_group
    dist.new_group = lambda *a, **k: (made.append(a), original(*a, **k))[1]
    try:
        process_groups._made.clear()
        for layer in model:
            Sync(2).apply(layer)
        other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(other(x), model(x))
        assert len(made) == (world // 2 if world > 2 else 0)
        assert process_groups.subgroup(2) is process_groups.subgroup(2)
    finally:
        dist.new_group = original


def claim_the_ranks_must_divide_into_the_groups(world):
    layer = nn.BatchNorm2d(3)
    for context in (Context(world_size=world), None):
        with pytest.raises(ValueError, match=f"{world} ranks cannot be cut into groups of 3"):
            Sync(3).apply(layer, context)
        assert type(layer) is nn.BatchNorm2d
    dist.barrier()


def claim_a_single_value_over_all_ranks_is_refused(world):
    layer = nn.BatchNorm1d(3)
    Sync().apply(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1 if dist.get_rank() == 0 else 0, 3))
    layer(torch.randn(1, 3))  # one a rank is enough


def claim_inference_does_not_wait_for_anyone(world):
    layer = nn.BatchNorm2d(3)
    Sync().apply(layer)
    if dist.get_rank() == 0:
        layer.eval()(torch.randn(2, 3, 4, 4))


def claim_a_group_of_one_is_plain(world):
    layer, plain = layers((0, 3, 2, 2))
    Sync(1).apply(layer)
    if dist.get_rank() == 0:
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        assert torch.equal(layer(x), plain(x))


def claim_bfloat16_keeps_its_dtype_and_exact_statistics(world):
    for mode in ("autocast", "layer"):
        layer = nn.BatchNorm2d(3, momentum=1.0)
        Sync().apply(layer)
        accurate = copy.deepcopy(layer).double()
        if mode == "layer":
            layer.bfloat16()
        torch.manual_seed(dist.get_rank())
        x = torch.randn(4, 3, 5, 5).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            output = layer(x)
        output.float().square().sum().backward()
        expected = accurate(x.detach().double())
        assert output.dtype is x.grad.dtype is torch.bfloat16
        assert layer.weight.grad.dtype is layer.weight.dtype
        torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.03)
        if mode == "autocast":
            torch.testing.assert_close(layer.running_var.double(), accurate.running_var, rtol=1e-5, atol=1e-5)


def claim_training_under_ddp_is_training_in_one_process(world):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)).double()

    whole, mine = network(), network()
    Sync().apply(mine[1])
    wrapped = DistributedDataParallel(mine)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (whole, mine)]
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(world * 3, 2, 6, 6, dtype=torch.float64)
        part = x.chunk(world)[dist.get_rank()]
        for model, batch, optimizer in zip((whole, wrapped), (x, part), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for (name, value), other in zip(whole.state_dict().items(), mine.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-9, msg=name)


def claim_compiled_it_agrees(world):
    if world > 2:
        return  # compiling takes its time, and has nothing to do with their number
    layer, _ = layers((0, 3, 2, 5))
    Sync().apply(layer)
    compiled = torch.compile(layer, backend="eager")
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))


def claim_a_new_world_makes_new_groups(world):
    """The last claim: it ends the world that the others ran in."""
    before = process_groups.subgroup(2)
    dist.barrier()
    dist.destroy_process_group()
    assert process_groups.subgroup(2) is None
    store = f"{os.environ['BNKIT_STORE']}-again"
    dist.init_process_group(
        "gloo", f"file://{store}", rank=int(os.environ["BNKIT_RANK"]), world_size=world, timeout=timedelta(seconds=60)
    )
    layer = nn.BatchNorm2d(3)
    Sync(2).apply(layer)
    assert layer(torch.randn(2, 3, 4, 4)).isfinite().all()
    assert process_groups.subgroup(2) is not before


CLAIMS = {name: claim for name, claim in globals().items() if name.startswith("claim_")}


def said(claim, world):
    """The traceback of a claim that does not hold; nothing of one that does."""
    try:
        claim(world)
    except Exception:
        return traceback.format_exc()
    return ""


def work(rank, world, folder):
    torch.set_num_threads(1)
    os.environ["BNKIT_STORE"], os.environ["BNKIT_RANK"] = f"{folder}/store", str(rank)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    found = {name: said(claim, world) for name, claim in CLAIMS.items()}
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    mp.start_processes(work, (request.param, str(folder)), nprocs=request.param, start_method="fork")
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(request.param)]


@pytest.mark.ddp
@pytest.mark.parametrize("claim", CLAIMS)
def test_in_real_processes(outcome, claim):
    assert not [text for rank in outcome if (text := rank[claim])]


def test_in_one_process_it_is_batchnorm_bit_for_bit():
    layer, plain = layers((0, 3, 2, 2))
    Sync(4).apply(layer)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))
    assert pool_running_statistics(layer) == 0


@pytest.mark.parametrize("size", [0, -2, 1.5, True])
def test_a_bad_value_is_said_in_one_sentence(size):
    with pytest.raises(ValueError, match="Sync's group_size is a number of ranks"):
        Sync(size)
