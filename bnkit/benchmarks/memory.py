"""Peak memory of a call: what its tensors took at the same time, beyond what was there before."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from bnkit.benchmarks.timing import Candidate, synchronize

__all__ = ["MEANING", "peak_memory", "peaks"]

MEANING = (
    "Peak memory: the most bytes that a call held at once in tensors of its own, as torch's allocator counts them (on "
    "the CPU by torch.profiler, on CUDA by max_memory_allocated); libraries' own scratch memory is not in it."
)


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Bytes that ``call`` held at once at the most, beyond those that were held before; it is called once.

    On the CPU this counts each allocation and release of torch's allocator, so it is the same at every run, and to the
    byte. (The process's resident memory has the interpreter in it and what earlier calls left with the system.)
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with _without_collector():
            call()
        synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    memory = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_remarks(), _without_collector(), memory as profiler:
        call()
    results = profiler.profiler.kineto_results
    held = peak = 0
    for event in sorted((event for event in results.events() if event.name() == "[memory]"), key=_when):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peaks(
    candidates: Mapping[str, Callable[[], object] | Candidate], device: str | torch.device = "cpu"
) -> dict[str, int]:
    """Of each candidate, after it has been prepared."""
    found = {}
    for name, given in candidates.items():
        candidate = given if isinstance(given, Candidate) else Candidate(given)
        candidate.prepare()
        found[name] = peak_memory(candidate.run, device)
    return found


def _when(event: object) -> int:
    return event.start_ns()  # type: ignore[attr-defined, no-any-return]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector would release what earlier calls have left, at a time of its own."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep the profiler's own lines, which it writes past Python, from standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:") and b"before the profiling started" not in line:
                    os.write(2, line)
