from __future__ import annotations

import pytest
import torch

from bnkit.training import Digits


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_have_the_promised_shapes():
    data = Digits(batch_size=4)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, *Digits.image_shape)
    assert images.dtype == torch.float32
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [1077, 360, 360]


def test_no_image_is_in_two_splits_and_none_is_lost():
    data = Digits(batch_size=4)
    parts = [rows(data.split(name).images) for name in ("train", "validation", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    everything, _ = data.read()[0]
    normalised = (everything - data.mean) / data.std
    assert parts[0] | parts[1] | parts[2] == rows(normalised)


def test_every_class_has_its_share_of_each_split():
    data = Digits(batch_size=4)
    for name, size in (("validation", 360), ("test", 360)):
        counts = torch.bincount(data.split(name).labels, minlength=10)
        assert counts.sum() == size
        assert counts.min() >= 34
        assert counts.max() <= 38


def test_images_are_normalised():
    images = Digits(batch_size=4).split("train").images
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_the_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    one = Digits(batch_size=4).split("validation").images
    torch.manual_seed(2)
    assert torch.equal(one, Digits(batch_size=2).split("validation").images)
    assert not torch.equal(one, Digits(batch_size=4, split_seed=1).split("validation").images)


def test_train_size_takes_a_part_of_the_training_split_and_leaves_the_others():
    whole, part = Digits(batch_size=4), Digits(batch_size=4, train_size=100)
    assert torch.equal(part.split("train").images, whole.split("train").images[:100])
    assert torch.equal(part.split("validation").images, whole.split("validation").images)


def test_training_batches_are_all_of_the_batch_size():
    assert {len(labels) for _, labels in Digits(batch_size=10).train_dataloader()} == {10}
    assert sum(len(labels) for _, labels in Digits(batch_size=10).val_dataloader()) == 360


def test_a_worker_process_yields_the_same_batches():
    here, there = Digits(batch_size=4), Digits(batch_size=4, num_workers=1)
    for one, other in zip(here.val_dataloader(), there.val_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"batch_size": "abc"}, "data.batch_size is 'abc'"),
        ({"batch_size": 4, "eval_batch_size": -1}, "data.eval_batch_size is -1"),
        ({"batch_size": 4, "num_workers": -1}, "data.num_workers is -1"),
        ({"batch_size": 4, "num_workers": "all"}, "data.num_workers is 'all'"),
    ],
)
def test_a_bad_size_is_named_at_once(options, names):
    with pytest.raises(ValueError, match=names):
        Digits(**options)


def test_a_training_split_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"data\.train_size is 2000, but the training split has 1077 images"):
        Digits(batch_size=4, train_size=2000).setup()
    with pytest.raises(ValueError, match=r"data\.batch_size is 64, but the training split has 50 images"):
        Digits(batch_size=64, train_size=50).train_dataloader()
    with pytest.raises(ValueError, match=r"set data\.validation_size in between"):
        Digits(batch_size=4, validation_size=5).setup()
