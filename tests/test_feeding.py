from dataclasses import dataclass

import pytest
import torch

from bnkit.feeding import known_samples_in, samples_in


@dataclass(slots=True)
class Slots:
    name: str
    images: torch.Tensor


@dataclass
class Plain:
    images: torch.Tensor


X = torch.zeros(8, 3, 5, 5)


@pytest.mark.parametrize(
    "batch",
    [X, (X, torch.zeros(9)), [X], {"id": "a", "x": X}, Slots("a", X), Plain(X), {"deep": [{"x": (X,)}]}],
    ids=lambda batch: type(batch).__name__,
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch):
    assert known_samples_in(batch) == samples_in(batch) == 8


@pytest.mark.parametrize("batch", [3, "text", [], None, torch.tensor(1.0)])
def test_of_a_batch_without_a_tensor_it_is_not_known(batch):
    assert known_samples_in(batch) is None
    assert samples_in(batch) == 1
