"""A sweep keeps to its directory, ends every job, can be killed and started again, and means what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bnkit.dashboard import sources
from bnkit.training import run
from bnkit.training.run_directory import LOCK_NAME, RESULT_NAME, alone_in

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = ("data.train_size=96", "data.validation_size=64", "test=false", "threads=1")
ONE_EPOCH = (*SHORT, "trainer.max_epochs=1", "logger=none")
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}


def needs(plugin):
    missing = importlib.util.find_spec("hydra_plugins") is None or (
        importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    )
    return pytest.mark.skipif(missing, reason=f"{plugin} is not installed: it is in the extra bnkit[sweeps]")


LAUNCHERS = [pytest.param(name, marks=needs(plugin)) for name, plugin in PLUGINS.items()]


def start(tmp_path, *overrides, **options):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--multirun", *overrides],
        cwd=tmp_path,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def sweep(tmp_path, *overrides):
    process = start(tmp_path, *overrides)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def result(folder):
    metrics = json.loads((Path(folder) / RESULT_NAME).read_text())["metrics"]
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def holder(folder):
    """The process that runs, or ran, the job there."""
    words = (Path(folder) / LOCK_NAME).read_text().split()
    return int(words[1]) if words else None


def text(folder):
    return (Path(folder) / "train.log").read_text()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seeds", "trainer", "steps"),
    [
        pytest.param("joblib", [0, 1], "cpu", 6, marks=needs("hydra_joblib_launcher")),
        pytest.param("submitit_local", [0], "ddp_spawn", 3, marks=needs("hydra_submitit_launcher")),
    ],
)
def test_the_jobs_of_a_sweep_share_a_directory_and_a_group_and_have_a_wandb_run_each(
    tmp_path, launcher, seeds, trainer, steps
):
    chosen = (f"launcher={launcher}", f"trainer={trainer}", f"seed={','.join(map(str, seeds))}")
    code, output = sweep(tmp_path, *ONE_EPOCH, "logger=wandb", *chosen)
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"], "something was written elsewhere"
    [folder] = (tmp_path / "outputs" / "train").iterdir()
    assert {path.name for path in folder.iterdir()} - {".submitit"} == {"multirun.yaml", *map(str, seeds)}
    ids = set()
    for job in map(str, seeds):
        checkpoint = torch.load(folder / job / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == steps, "a process had more or less than its share"
        assert result(folder / job)
        [run_folder] = (folder / job / "wandb").glob("offline-run-*")
        ids.add(run_folder.name.rsplit("-", 1)[1])
        assert "val/accuracy" in sources.read(run_folder).metrics
        [log] = run_folder.glob("*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f'"run_group":"{folder.name}"' in shown
        assert re.search(r'"exit(_code)?":', shown), "the run was not finished"
    assert len(ids) == len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", LAUNCHERS[0]])
def test_a_killed_sweep_started_again_runs_what_is_missing_to_the_same_results(job_config, tmp_path, launcher):
    options = {
        "basic": (),
        "joblib": ("launcher=joblib", "hydra.launcher.n_jobs=1"),
    }
    long = (*SHORT, "trainer.max_epochs=10", "logger=none")
    command = (*options[launcher], *long, "seed=0,1", "hydra.sweep.dir=sweep")
    whole = job_config(*long, "seed=1", run="whole", short=False)
    run(whole)
    process = start(tmp_path, *command)
    second = tmp_path / "sweep" / "1"
    wait_for(second / "checkpoints" / "last.ckpt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (second / RESULT_NAME).exists(), "it was killed too late to tell anything"
    first = tmp_path / "sweep" / "0"
    before = (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    code, output = sweep(tmp_path, *command)
    assert code == 0, output
    assert "Going on from" in text(second)
    assert result(second) == pytest.approx(result(whole.run_dir), rel=0, abs=0)
    assert result(first).keys() == result(second).keys()
    assert "Finished before" in text(first)
    assert (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
@needs("hydra_submitit_launcher")
def test_a_job_queued_again_by_submitit_and_then_killed_with_its_sweep_goes_on_in_its_directory(job_config, tmp_path):
    long = (*SHORT, "trainer.max_epochs=10", "logger=none")
    whole = job_config(*long, run="whole", short=False)
    run(whole)
    command = ("launcher=submitit_local", *long, "hydra.sweep.dir=sweep")
    process = start(tmp_path, *command)
    job = tmp_path / "sweep" / "0"
    wait_for(job / "checkpoints" / "last.ckpt", process)
    first = holder(job)
    os.kill(first, signal.SIGUSR2)  # what submitit has SLURM send before the time is up
    while holder(job) in (first, None):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (job / RESULT_NAME).exists(), "it was killed too late to tell anything"
    code, output = sweep(tmp_path, *command)
    assert code == 0, output
    assert text(job).count("Going on from") >= 1
    assert result(job) == pytest.approx(result(whole.run_dir), rel=0, abs=0)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0", ".submitit", "multirun.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS[1:])  # the basic one: test_launching.py
def test_processes_that_would_repeat_the_sweep_are_refused_under_a_launcher_too(tmp_path, launcher):
    code, output = sweep(tmp_path, f"launcher={launcher}", "trainer=ddp", *ONE_EPOCH)
    assert code == 1
    assert "use trainer=ddp_spawn, or start every process yourself with torchrun" in output
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_the_objective_is_the_accuracy_by_the_statistics_that_the_model_has(tmp_path):
    # what the search space has is overridden on the command line, but for recalibration
    fixed = ("callbacks.swap.rules.size=4", "data.batch_size=8", "hydra.sweep.dir=sweep")
    code, output = sweep(tmp_path, "hparams_search=norm_batch", *ONE_EPOCH, *fixed)
    assert code == 0, output
    found = {}
    for job in ("0", "1"):
        cfg = yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())
        found["none" if cfg["callbacks"]["recalibration"] is None else "default"] = result(tmp_path / "sweep" / job)
    assert found["none"]["val/accuracy"] == found["default"]["val/accuracy_running_average"], "the same weights"
    assert found["none"]["val/accuracy"] != found["default"]["val/accuracy"]


@pytest.mark.slow
@needs("hydra_optuna_sweeper")
def test_an_optuna_sweep_started_again_with_more_jobs_runs_only_those(tmp_path):
    command = ("hparams_search=norm_batch_optuna", "hydra.sweeper.sampler.n_startup_trials=1", *ONE_EPOCH)
    place = ("hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep")
    code, output = sweep(tmp_path, *command, *place, "hydra.sweeper.n_trials=2")
    assert code == 0, output
    before = {job: result(tmp_path / "sweep" / job) for job in ("0", "1")}
    code, output = sweep(tmp_path, *command, *place, "hydra.sweeper.n_trials=3")
    assert code == 0, output
    assert output.count("Finished before") == 2
    assert {job: result(tmp_path / "sweep" / job) for job in ("0", "1")} == before
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    accuracies = [result(tmp_path / "sweep" / job)["val/accuracy"] for job in ("0", "1", "2")]
    assert best["best_value"] == max(accuracies)


def test_a_job_does_not_go_on_from_the_checkpoint_of_another(job_config):
    run(job_config("test=false", "data.batch_size=8"))
    with pytest.raises(ValueError, match=r"another job: data.batch_size is 8 there and 16 here. .* resume=false"):
        run(job_config("test=false", "data.batch_size=16"))
    with pytest.raises(ValueError, match=r"another job: callbacks.recalibration is None there|callbacks.recalibration"):
        run(job_config("test=false", "data.batch_size=8", "recalibration=none"))
    assert run(job_config("test=false", "data.batch_size=16", "resume=false"))


def test_a_job_killed_between_its_last_checkpoint_and_its_result_has_the_same_result(job_config, tmp_path):
    cfg = job_config(*ONE_EPOCH, short=False)
    first = run(cfg)
    (tmp_path / "run" / RESULT_NAME).unlink()
    assert run(cfg) == pytest.approx(first, rel=0, abs=0, nan_ok=True)


HOLDER = """
import sys, time
from bnkit.training.run_directory import alone_in
with alone_in(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


def test_a_job_waits_for_the_one_that_runs_in_its_directory_and_goes_on_when_that_is_killed(tmp_path, held):
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import logging; logging.basicConfig(level='INFO'){HOLDER}", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = next(line for line in waiting.stderr if "is in use" in line)
        assert f"process {held.pid} on" in said
        assert waiting.poll() is None
        held.kill()
        assert waiting.stdout.readline() == "in\n"
    finally:
        waiting.kill()
        waiting.communicate()


def test_one_of_several_ranks_does_not_wait_while_the_others_would_time_out(tmp_path, held, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=rf"process {held.pid} on .* choose another directory"), alone_in(tmp_path):
        pass


def test_a_directory_is_free_again_after_a_job_also_after_one_that_fails(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path):
        raise KeyError
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
