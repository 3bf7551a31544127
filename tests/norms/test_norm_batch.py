import pytest
import torch
from torch import nn

from bnkit.norms import Context, Ghost, NormBatch, Sync, spec_of


@pytest.mark.parametrize(
    ("size", "batch", "ranks", "expected"),
    [
        (4, 32, 1, Ghost(4)),
        (5, 32, 8, Ghost(5)),
        (32, 32, 1, None),
        (32, 32, 8, None),
        (8, 4, 8, Sync(2)),
        (16, 4, 8, Sync(4)),
        (32, 4, 8, Sync()),
        (2, 1, 2, Sync()),
    ],
)
def test_the_plan_is_ghost_plain_or_sync(size, batch, ranks, expected):
    assert NormBatch(size).resolve(Context(batch, ranks)) == expected


def test_the_plan_follows_the_world():
    assert NormBatch(16).resolve(Context(16, 1)) is None
    assert NormBatch(16).resolve(Context(8, 2)) == Sync()
    assert NormBatch(16).resolve(Context(32, 2)) == Ghost(16)


@pytest.mark.parametrize("rounding", ["error", "nearest"])
def test_above_the_global_batch_it_names_the_alternatives(rounding):
    with pytest.raises(ValueError, match=r"global batch of 8 .* Renorm, Group or Frozen"):
        NormBatch(16, rounding).resolve(Context(4, 2))


def test_it_rounds_only_where_it_says_so():
    with pytest.raises(ValueError, match=r"choose one of 4, 8, 16, 32, or rounding='nearest'"):
        NormBatch(12).resolve(Context(4, 8))
    assert NormBatch(12, "nearest").resolve(Context(4, 8)) == Sync(2)  # of 8 and 16, the smaller
    assert NormBatch(14, "nearest").resolve(Context(4, 8)) == Sync(4)
    assert NormBatch(5, "nearest").resolve(Context(4, 8)) is None


def test_it_needs_the_devices_batch():
    with pytest.raises(ValueError, match="device's batch size, which is not known"):
        NormBatch(4).resolve(Context())


@pytest.mark.parametrize(
    ("size", "batch", "words"),
    [(4, 33, "ghosts of 4 or 5 samples"), (4, 4, "plain BatchNorm"), (8, 4, "2 ranks of 4 samples, 8 together")],
)
def test_the_plan_explains_itself_in_a_line(size, batch, words):
    assert words in NormBatch(size).explain(Context(batch, 8))


def test_applied_it_is_what_it_resolves_to():
    layer = nn.BatchNorm2d(3)
    NormBatch(2).apply(layer, Context(8, 1))
    assert spec_of(layer) == Ghost(2)
    NormBatch(8).apply(layer, Context(8, 1))
    assert type(layer) is nn.BatchNorm2d
    Ghost(2).apply(layer)
    with pytest.raises(ValueError, match="global batch"):
        NormBatch(64).apply(layer, Context(8, 1))
    assert spec_of(layer) == Ghost(2)
    assert layer(torch.randn(4, 3, 2, 2)).shape == (4, 3, 2, 2)


@pytest.mark.parametrize(("size", "rounding"), [(0, "error"), (1.5, "error"), (True, "error"), (4, "up")])
def test_a_bad_value_is_said_in_one_sentence(size, rounding):
    with pytest.raises(ValueError, match="NormBatch's"):
        NormBatch(size, rounding)
