import json

import pytest
from hydra import compose, initialize_config_module

from bnkit.training import study as study_module
from bnkit.training.study import run_study, table


@pytest.fixture
def cfg(tmp_path):
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        yield compose(
            "study",
            overrides=[
                f"folder={tmp_path}",
                "common=['data=digits','logger=none','test=false','debug=default']",
                "batch_sizes=[8]",
                "seeds=[0,1]",
                "only=[BatchNorm,Ghost]",
            ],
        )


def test_a_study_runs_what_has_no_result_and_compares(cfg, tmp_path, monkeypatch):
    jobs = []

    def counted(job):
        jobs.append((job.data.batch_size, job.seed, job.model.optimizer.lr, job.callbacks.get("swap")))
        return run(job)

    run = study_module.run
    monkeypatch.setattr(study_module, "run", counted)
    text = run_study(cfg)
    assert [(batch, seed) for batch, seed, _, _ in jobs] == [(8, 0), (8, 0), (8, 1), (8, 1)]
    assert {rate for _, _, rate, _ in jobs} == {8 * 0.0016}
    assert [swap and swap.rules.size for _, _, _, swap in jobs] == [None, 4, None, 4]
    result = json.loads((tmp_path / "Ghost/8/1/metrics.json").read_text())
    other = json.loads((tmp_path / "Ghost/8/0/metrics.json").read_text())
    mean = 50 * (result["val/accuracy"] + other["val/accuracy"])
    [row] = [line for line in text.splitlines() if line.startswith("| Ghost")]
    assert f"{mean:.1f} ±" in row
    assert run_study(cfg) == text
    assert len(jobs) == 4, "what has a result is not run again"


def test_a_method_whose_statistics_cannot_differ_has_one_number(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        folder = tmp_path / "Group_norm" / "2" / str(seed)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"val/accuracy": accuracy}))
    row = table(tmp_path, ["Group norm", "Sync"], [2]).splitlines()[2:]
    assert row == ["| Group norm | 60.0 ± 14.1 | - |", "| Sync |  | - |"]


def test_an_unknown_method_is_named(cfg):
    cfg.only = ["Gost"]
    with pytest.raises(ValueError, match=r"only=\['Gost'\].*Ghost"):
        run_study(cfg)
