"""The comparison before and after adaptation: what it measures, and how it tells it."""

import copy
import json

import pytest
import torch
from hydra import compose, initialize_config_module

import bnkit
from bnkit.training import adaptation as adaptation_module
from bnkit.training import run_adaptation
from bnkit.training.adaptation import tables
from bnkit.training.corruptions import noise

QUICK = [
    "only=[digits]",
    "seeds=[0,1]",
    "test_size=120",
    "samples=[32]",
    "classes=[1,10]",
    "prior_samples=[0,16]",
    "model.network.width=4",
    "model.network.depths=[1,1]",
    "shifts.digits.epochs=2",
    "+shifts.digits.source.train_size=320",
    "~shifts.digits.targets",
    "+shifts.digits.corrupted=true",
]


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation_module, "CORRUPTIONS", {"noise": noise})  # one is enough, and quick
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        yield compose("adapt", overrides=[f"folder={tmp_path}", *QUICK])


@torch.no_grad()
def _error(model, images, labels, source):
    model.eval()
    predicted = model((images - source.mean) / source.std).argmax(1)
    return float((predicted != labels).double().mean())


@pytest.mark.slow
def test_what_is_measured_is_the_error_before_and_after_recalibration_on_the_same_images(cfg, monkeypatch):
    jobs = []

    class Kept(adaptation_module._Job):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            jobs.append(self)
            self.trained = copy.deepcopy(self.module.state_dict())

    monkeypatch.setattr(adaptation_module, "_Job", Kept)
    cfg.seeds = [0]
    run_adaptation(cfg)
    [job] = jobs
    assert all(torch.equal(value, job.trained[name]) for name, value in job.module.state_dict().items())
    found = {(one["table"], one["row"], one["column"]): one["error"] for one in job.found}
    clean = job.source.split("test")
    images = (clean.images[:120] * job.source.std + job.source.mean).clamp(0, 1)
    labels = clean.labels[:120]
    by_severity = "error in %, by severity"
    assert found[by_severity, "clean", "1"] == pytest.approx(_error(job.module, images, labels, job.source))
    corrupted = noise(images, 4)
    assert found[by_severity, "noise", "4"] == pytest.approx(_error(job.module, corrupted, labels, job.source))
    adapted = copy.deepcopy(job.module)
    bnkit.recalibrate(adapted, [(corrupted - job.source.mean) / job.source.std], max_samples=None)
    assert found[by_severity, "noise, adapted", "4"] == pytest.approx(_error(adapted, corrupted, labels, job.source))


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_tells_all_it_has(cfg, tmp_path, monkeypatch, capsys):
    trained = []

    class Counted(adaptation_module._Job):
        def _trained(self):
            trained.append(self.seed)
            return super()._trained()

    monkeypatch.setattr(adaptation_module, "_Job", Counted)
    text = run_adaptation(cfg)
    assert trained == [0, 1]
    assert run_adaptation(cfg) == text
    assert trained == [0, 1]
    assert text in capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == text + "\n"
    results = json.loads((tmp_path / "digits" / "1.json").read_text())
    assert all(0 <= one["error"] <= 1 for one in results)
    headings = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and "±" not in line]
    assert headings == [
        "| error in %, by severity",
        "| severity 3, target samples",
        "| severity 3, batches of",
        "| severity 3, classes in the target",
    ]


def test_a_target_of_some_classes_has_the_images_of_these_alone(cfg, monkeypatch):
    seen = {}

    class Watched(adaptation_module._Job):
        def _measure(self, cell, images, labels, *args, **options):
            if "classes" in cell[0]:
                seen.setdefault(cell[1], []).append(labels.unique().tolist())

    monkeypatch.setattr(adaptation_module, "_Job", Watched)
    cfg.seeds, cfg.classes = [0], [1, 3, 10]
    run_adaptation(cfg)
    assert seen["clean, 1"][::3] == [[0], [2], [4], [6], [8]]
    assert seen["clean, 3"][::3] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [0, 8, 9]]
    assert seen["noise, 10"] == [list(range(10))] * 3


def test_tables_are_means_and_spreads_over_the_models():
    def one(error, row="a", column="x"):
        return {"table": "t", "row": row, "column": column, "error": error}

    text = tables([[one(0.1), one(0.3), one(0.5, column="y")], [one(0.4), one(0.5, column="y"), one(0.9, "b", "y")]])
    assert text.splitlines() == [
        "| t | x | y |",
        "|---|---|---|",
        "| a | 30.0 ± 14.1 | 50.0 ± 0.0 |",
        "| b |  | 90.0 |",
    ]


def test_a_shift_that_is_not_there_is_named(cfg):
    cfg.only = ["fasion"]
    with pytest.raises(ValueError, match=r"only=\['fasion'\].*fashion"):
        run_adaptation(cfg)
