"""What ``import bnkit`` takes over ``import torch``, in fresh interpreters."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

from bnkit.benchmarks.result import Goal, Result, rows
from bnkit.benchmarks.timing import Ratio, Timings, of_each_round

__all__ = ["measure"]


def measure(*, baseline: str, statements: list[str], rounds: int, seed: int) -> Result:
    """Start interpreters that do one import and end, in random order.

    Args:
        baseline: what the others are compared with.
        statements: those others.
        rounds: measurements of each.
        seed: of the order.
    """
    order = [baseline, *statements]
    found: dict[str, list[tuple[float, float, float]]] = {statement: [] for statement in order}
    shuffle = random.Random(seed).shuffle
    for counted in range(-1, rounds):  # the first fills the file cache and writes the bytecode
        shuffle(order)
        for statement in order:
            one = _start(statement)
            if counted >= 0:
                found[statement].append(one)
    cpu, wall, memory = ({name: [one[i] for one in ones] for name, ones in found.items()} for i in range(3))
    goal = Goal("cpu", 1.1)
    table = rows("a fresh interpreter", Timings(baseline, cpu, wall), {}, goals=dict.fromkeys(statements, goal))
    for row in table:
        row.found["memory"] = Ratio.of(of_each_round(memory[row.candidate], memory[baseline]))
    return Result(
        "import",
        "cpu",
        f"A fresh interpreter that imports and ends, over one with {baseline!r}.",
        rounds,
        table,
        ["Memory: the process's largest resident set, the interpreter and all libraries included."],
    )


def _start(statement: str) -> tuple[float, float, float]:
    """CPU seconds and wall seconds of a process from its start to its end, and its largest resident set."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", statement])
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{statement!r} failed in a fresh interpreter, with status {process.returncode}.")
    return usage.ru_utime + usage.ru_stime, wall, float(usage.ru_maxrss)
