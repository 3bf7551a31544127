"""What bnkit costs, beside what it is compared with, in one run; see ``scripts/benchmark.py``."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnkit.benchmarks.machine import describe
from bnkit.benchmarks.page import write_page
from bnkit.benchmarks.picture import draw
from bnkit.benchmarks.result import Result

__all__ = ["BENCHES", "arguments_of", "run"]

log = logging.getLogger(__name__)

# By name the module, imported when it is run: processes that a benchmark starts need not wait for Lightning.
BENCHES = {
    "recalibration": "recalibration",
    "monitor": "monitor",
    "ghost": "ghost",
    "sync": "sync",
    "swap": "swap",
    "import": "imports",
    "scaling": "scaling",
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure as ``conf/benchmark.yaml`` says; print tables, and write them as JSON, as pictures and as a page.

    With ``cfg.results`` nothing is measured: the page is written of what earlier runs have stored.

    Returns:
        What is stored: the results with the machine, the versions and the command.

    Raises:
        ValueError: for ``cfg.device`` that is not there, or ``cfg.results`` without ``cfg.output_markdown``.
        RuntimeError: for ``bench=all``, at its end, if one of them failed.
    """
    if cfg.results:
        if cfg.output_markdown is None:
            raise ValueError("results= writes the page of earlier runs: say where, by output_markdown=….")
        runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in cfg.results]
        write_page(runs, Path(cfg.output_markdown))
        log.info("Written to %s", cfg.output_markdown)
        return {"results": [result for one in runs for result in one["results"]]}
    if torch.device(cfg.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: this machine has no CUDA device, or torch was built without CUDA.")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    stored: dict[str, Any] = {
        "command": _command(cfg),
        "device": cfg.device,
        "seed": cfg.seed,
        "quick": bool(cfg.quick),
        "machine": describe(cfg.device),
        "results": [],
    }
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for one in _each(cfg):
        arguments = arguments_of(one)
        try:
            result: Result = _module(one.bench).measure(**arguments)
        except Exception as error:
            if cfg.bench != "all":
                raise
            log.exception("bench=%s failed", one.bench)
            failures[one.bench] = f"{type(error).__name__}: {error}"
            continue
        result.settings.update(arguments)
        log.info("%s\n", result.text())
        if cfg.quick:
            log.info("The smallest sizes, to see that all works: the numbers mean nothing.\n")
        stored["results"].append(result.to_dict())
        # After each: a long run that is stopped has the ones before.
        output.write_text(json.dumps(stored, indent=2), encoding="utf-8")
        picture = output.with_name(f"{output.stem}-{one.bench}.svg")
        if draw(result, picture):
            log.info("Picture: %s\n", picture)
    log.info("Written to %s", output)
    if cfg.output_markdown is not None:
        write_page([stored], Path(cfg.output_markdown))
        log.info("Page: %s", cfg.output_markdown)
    if failures:
        raise RuntimeError(f"The other results are written, but these benchmarks failed: {failures}")
    return stored


def arguments_of(cfg: DictConfig) -> dict[str, Any]:
    """What the benchmark's ``measure`` gets of the config: its smallest sizes under ``quick``."""
    names = inspect.signature(_module(cfg.bench).measure).parameters
    smallest = cfg.smallest if cfg.quick else {}
    chosen = OmegaConf.create({name: smallest[name] if name in smallest else cfg[name] for name in names})
    return {str(name): value for name, value in OmegaConf.to_container(chosen).items()}  # type: ignore[union-attr]


def _module(bench: str) -> Any:
    return importlib.import_module(f"bnkit.benchmarks.{BENCHES[bench]}")


def _each(cfg: DictConfig) -> list[DictConfig]:
    """The config itself, or of ``bench=all`` one for each benchmark, with what they share."""
    if cfg.bench != "all":
        return [cfg]
    shared = [f"{key}={cfg[key]}" for key in ("device", "seed", "quick")]
    shared.append(f"threads={'null' if cfg.threads is None else cfg.threads}")
    if cfg.rounds is not None:
        shared.append(f"rounds={cfg.rounds}")
    found = []
    for name in cfg.benches:
        if name == "import" and cfg.device != "cpu":
            continue  # the same on every device
        found.append(_composed([f"bench={name}", *shared]))
    return found


def _composed(overrides: list[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return compose("benchmark", overrides=overrides)
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        return compose("benchmark", overrides=overrides)


def _command(cfg: DictConfig) -> str:
    """How to measure the same again; where files are written is left out."""
    if not HydraConfig.initialized():
        return f"bnkit-benchmark bench={cfg.bench}"
    given = [one for one in HydraConfig.get().overrides.task if not one.startswith(("output", "results"))]
    return " ".join(["bnkit-benchmark", *given])
