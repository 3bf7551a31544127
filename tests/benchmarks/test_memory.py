import pytest
import torch

from bnkit.benchmarks.memory import peak_memory, peaks
from bnkit.benchmarks.timing import Candidate

MEGABYTE = 2**20


def held(*megabytes):
    return [torch.empty(size * MEGABYTE, dtype=torch.uint8) for size in megabytes]


def test_what_is_held_at_once_counts_and_what_was_released_before_does_not():
    assert peak_memory(lambda: held(3, 2)) == 5 * MEGABYTE
    assert peak_memory(lambda: (held(3), held(2))[0]) == 5 * MEGABYTE
    assert peak_memory(lambda: [len(held(3)), len(held(2))]) == 3 * MEGABYTE


def test_what_was_held_before_does_not_count_nor_does_its_release():
    before = held(8)

    def call():
        before.clear()
        return held(1)

    assert peak_memory(call) <= MEGABYTE


def test_a_call_that_takes_nothing_has_no_peak(capfd):
    assert peak_memory(lambda: None) == 0
    assert capfd.readouterr().err == "", "the profiler's own lines"


def test_preparing_is_not_counted():
    kept = []
    candidates = {"own": Candidate(lambda: held(1), lambda: kept.extend(held(4)))}
    assert peaks(candidates) == {"own": MEGABYTE}


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked():
    assert peak_memory(lambda: torch.empty(4 * MEGABYTE, dtype=torch.uint8, device="cuda"), "cuda") == 4 * MEGABYTE
