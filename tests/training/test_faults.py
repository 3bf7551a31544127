"""A planted fault of each kind shows in the alarms, on the page and in W&B."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnkit.dashboard import sources
from bnkit.dashboard.history import RunHistory
from bnkit.training import ShiftedInputs, run

FASHION = Path("/usr/share/datasets/fashion-mnist")
MEASURED = (
    "data=fashion_mnist",
    "data.train_size=14400",
    "data.validation_size=500",
    "trainer.max_epochs=1",
    "model.network.width=8",
    "model.optimizer.lr=0.05",
    "logger=wandb",
    "test=false",
    "threads=1",
    "callbacks.comparison=null",
)
INNER = "network.stages.1.0.bn1"
FAULTS = {
    "inputs": (["fault=inputs"], "shift", "network.stem.1", range(300, 305)),
    "frozen": (["fault=frozen"], "stale", INNER, range(300, 450)),
    "dead": (["fault=dead"], "dead", INNER, range(300, 401)),
    "not_a_number": (["fault=not_a_number"], "nonfinite", "network.stem.1", range(300, 301)),
    "dropout": (["model.network.dropout=0.3"], "dropout", "network.stages.0.0.bn2", range(199, 200)),
}


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_fashion_mnist_shows_on_the_page_and_in_wandb(job_config, tmp_path, fault):
    overrides, code, layer, steps = FAULTS[fault]
    config = job_config(*MEASURED, *overrides, short=False)
    if fault == "not_a_number":
        with pytest.raises(FloatingPointError, match=r"network\.stem\.1"):
            run(config)
    else:
        run(config)
    history = RunHistory.load(tmp_path / "run" / "bn_history.json")
    found = [alarm for alarm in history.tables["alarms"].records() if alarm["code"] == code]
    assert [alarm["layer"] for alarm in found] == [layer]
    [alarm] = found
    assert alarm["step"] in steps
    page = (tmp_path / "run" / "report.html").read_text()
    assert alarm["message"].replace("'", "&#39;") in page
    assert layer in alarm["message"]
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    logged = sources.read(folder)
    assert logged.metrics["bn/alarms"][-1][1] >= 1
    if fault != "not_a_number":  # a run that fails has no tables
        assert code in [row["code"] for row in logged.tables["alarms"].records()]


def test_a_fault_in_a_layer_that_is_not_there_says_which_there_are(job_config):
    config = job_config("fault=dead", "callbacks.fault.layer=network.bn9", "callbacks.fault.step=0")
    with pytest.raises(ValueError, match=r"no BatchNorm layer 'network.bn9' .*network\.stem\.1"):
        run(config)


def test_no_fault_is_planted_by_itself(job_config):
    assert "fault" not in job_config().callbacks


def test_a_fault_before_the_first_step_is_refused():
    with pytest.raises(ValueError, match="number of a training batch"):
        ShiftedInputs(-1)
