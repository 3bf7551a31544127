"""What goes wrong on one rank is told on all of them, by rank, layer and reason, and nobody waits for ever."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.lightning_models import Classifier, loader, trainer
from helpers.processes import run
from helpers.references import ConvNet, assert_same, inputs, snapshot
from lightning.pytorch import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnkit
from bnkit import norms
from bnkit.callbacks import BatchNormRecalibration

pytestmark = pytest.mark.ddp

# Long enough for a slow machine; far from the half hour for which gloo would wait.
MINUTE = 60


# ---------------------------------------------------------------- ranks that do not agree


class Reordered(ConvNet):
    """The same layers by the same names, registered the other way round."""

    def __init__(self):
        super().__init__()
        bn1 = self.bn1
        del self.bn1
        self.bn1 = bn1


def _differing(rank, world_size, how):
    torch.manual_seed(0)
    model, options = ConvNet(), {}
    if rank == 1:
        if how == "missing":
            model.bn2 = nn.Identity()
        elif how == "channels":
            model.bn2, model.conv2 = nn.BatchNorm2d(5), nn.Conv2d(6, 5, 3)
        elif how == "frozen":
            model.bn2.eval()
        elif how == "order":
            model = Reordered()
        elif how == "synchronized":
            norms.Sync().apply(model.bn2)
        elif how == "untracked":
            model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
        else:
            options[how] = {"max_samples": 16, "tolerance": 0.1, "prior_samples": 4, "consistency": "population"}[how]
    before = snapshot(model)
    try:
        bnkit.recalibrate(model, inputs(), **options)
    except Exception as error:
        assert_same(before, snapshot(model))
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("how", ["missing", "channels", "frozen", "order", "synchronized", "untracked"])
def test_models_that_differ_are_refused_alike_on_every_rank_by_the_layers_name(how):
    found = run(_differing, 3, how)
    assert len(set(found)) == 1
    kind, message = found[0]
    assert kind == "ValueError"
    assert "'bn2'" in message
    assert "rank 1" in message


@pytest.mark.parametrize("argument", ["max_samples", "tolerance", "prior_samples", "consistency"])
def test_arguments_that_differ_are_refused_alike_on_every_rank(argument):
    found = run(_differing, 2, argument)
    assert found[0] == found[1]
    assert found[0][0] == "ValueError"
    assert argument in found[0][1]


def _misused(rank, world_size):
    model = ConvNet()
    try:
        bnkit.recalibrate(model, inputs(), max_samples=-rank or None)
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_argument_out_of_range_on_one_rank_is_told_on_the_others():
    (kind, message), (own_kind, own) = run(_misused, 2)
    assert own_kind == "ValueError"
    assert kind == "RuntimeError"
    assert "rank 1" in message
    assert own in message


# ---------------------------------------------------------------- a rank that fails among them


def _breaking(rank, world_size, where):
    torch.manual_seed(0)
    model, data = ConvNet(), inputs(batches=4)

    def forward(model, batch):
        if rank == 1 and where == "forward":
            raise ZeroDivisionError("no such luck")
        if rank == 1 and where == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        return model(batch)

    def batches():
        yield from data[:2]
        if rank == 1 and where == "loader":
            raise OSError("disk gone")
        yield from data[2:]

    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = snapshot(model)
    try:
        bnkit.recalibrate(model, batches(), forward=forward)
    except BaseException as error:
        assert_same(before, snapshot(model))
        # Ranks are still in step: what they send next finds its way.
        total = torch.ones(3)
        dist.all_reduce(total)
        return type(error).__name__, str(error), total[0].item()


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("forward", "ZeroDivisionError: no such luck"),
        ("loader", "OSError: disk gone"),
        ("Ctrl-C", "KeyboardInterrupt"),
    ],
)
def test_the_other_ranks_say_which_rank_failed_and_why(where, error):
    found = run(_breaking, 3, where)
    assert found[1][0] == error.split(":")[0]
    for kind, message, total in (found[0], found[2]):
        assert kind == "RuntimeError"
        assert f"rank 1 failed: {error}" in message
        assert total == 3


def _no_data(rank, world_size):
    model = ConvNet()
    return bnkit.recalibrate(model, [] if rank else inputs(batches=3), max_samples=None).batches


def test_a_rank_without_data_does_not_stall_the_others():
    assert run(_no_data, 4) == [3, 3, 3, 3]


# ---------------------------------------------------------------- a process that ends among them


def _main(rank, world_size, folder, job, arguments):
    torch.set_num_threads(1)
    signal.alarm(MINUTE)  # a process that hangs is killed by this, which no test takes for an error
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    said = ""
    try:
        job(rank, *arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    with open(os.path.join(folder, f"{rank}.txt"), "w") as file:
        file.write(said)
    os._exit(bool(said))


def _ended(folder, job, *arguments, world_size=2):
    """Exit code and error of each rank. No process waits for another at the end, as they do in ``run``."""
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_main, args=(rank, world_size, str(folder), job, arguments))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(2 * MINUTE)
    said = [(folder / f"{rank}.txt") for rank in range(world_size)]
    return [(p.exitcode, path.read_text() if path.exists() else "") for p, path in zip(started, said, strict=True)]


def _raises_between_synchronized_layers(rank, world):
    torch.manual_seed(0)
    model = ConvNet()
    for layer in (model.bn1, model.bn2):
        norms.Sync().apply(layer)
    if rank == 1:

        def fails(*_):
            raise ZeroDivisionError("no such luck")

        model.conv2.register_forward_pre_hook(fails)
    before = snapshot(model)
    try:
        bnkit.recalibrate(model, inputs())
    finally:
        assert_same(before, snapshot(model))


def test_a_forward_that_fails_among_synchronized_layers_ends_the_job_with_that_error(tmp_path):
    # gloo ends a process that is sent a message of another length than it waits for, without a Python error.
    (code, said), (own_code, own) = _ended(tmp_path, _raises_between_synchronized_layers, 2)
    assert (own_code, own) == (1, "ZeroDivisionError: no such luck")
    assert code == 1
    assert said.startswith("RuntimeError: ")
    assert "rank 1 failed: ZeroDivisionError: no such luck" in said


def _killed_in_recalibration(rank, spec):
    model = ConvNet()
    bnkit.swap(model, spec) if spec else None

    def forward(model, batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    before = snapshot(model)
    try:
        bnkit.recalibrate(model, inputs(), forward=forward)
    finally:
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("spec", [None, norms.Sync()], ids=["plain", "synchronized"])
def test_a_rank_killed_in_a_recalibration_ends_the_others(tmp_path, spec):
    (code, said), (own_code, _), (other_code, other) = _ended(tmp_path, _killed_in_recalibration, spec, world_size=3)
    assert own_code == -signal.SIGKILL
    assert (code, other_code) == (1, 1)
    for text in (said, other):
        assert text.startswith("UnreachableError: The other ranks do not answer")


def _fails_beside_a_rank_that_dies(rank):
    def forward(model, batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("no such luck")

    bnkit.recalibrate(ConvNet(), inputs(), forward=forward)


def test_a_rank_that_fails_beside_one_that_dies_raises_its_own_error(tmp_path):
    (code, said), _ = _ended(tmp_path, _fails_beside_a_rank_that_dies)
    assert (code, said) == (1, "ZeroDivisionError: no such luck")


def _dies_in_training(rank, how):
    torch.manual_seed(0)
    model = ConvNet().double()
    bnkit.swap(model, norms.Sync())
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        if rank == 1 and step == 2:
            how()
        wrapped(torch.randn(4, 2, 8, 8).double()).square().sum().backward()


def _exits():
    os._exit(3)


def _kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("how", "own"), [(_exits, 3), (_kills_itself, -signal.SIGKILL)], ids=["exit", "kill"])
def test_a_rank_that_dies_in_synchronized_training_ends_the_others(tmp_path, how, own):
    (code, said), (own_code, _) = _ended(tmp_path, _dies_in_training, how)
    assert own_code == own
    assert code == 1
    assert said.strip()


# ---------------------------------------------------------------- the same through Lightning and its launchers


class FailsInRecalibration(Callback):
    """On rank 1 the first forward after training, which is the recalibration's, raises or kills the process."""

    def __init__(self, how="raises"):
        self.how = how

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if trainer.sanity_checking or trainer.global_rank != 1:
            return

        def fails(*_):
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("no such luck")

        next(pl_module.children()).register_forward_pre_hook(fails)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*isinstance.treespec, LeafSpec.", "ignore:.*log_every_n_steps"
)
@pytest.mark.parametrize(("how", "message"), [("raises", "no such luck"), ("dies", "process 1 .* SIGKILL")])
def test_a_recalibration_that_fails_on_one_rank_ends_the_fit_with_its_error(tmp_path, how, message):
    callbacks = [BatchNormRecalibration(), FailsInRecalibration(how)]
    engine = trainer(tmp_path, callbacks, strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=message):
        engine.fit(Classifier(), loader(), loader(shuffle=False))


SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
SHORT = [
    "data.train_size=128",
    "data.validation_size=64",
    "trainer.max_epochs=1",
    "test=false",
    "threads=1",
    "logger=csv",
]
FAILS = "+callbacks.fails._target_=test_failing_well.FailsInRecalibration"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "how"), [((sys.executable,), "raises"), (TORCHRUN, "dies")])
def test_a_job_whose_rank_1_fails_in_recalibration_ends_as_failed(tmp_path, launcher, how):
    command = [*launcher, str(SCRIPT), "trainer=ddp", *SHORT, FAILS, f"+callbacks.fails.how={how}"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, text=True, start_new_session=True)
        try:
            code = process.wait(2 * MINUTE)  # about half a minute of it to import, and to train
        finally:
            left = _end_session(process.pid)
    said = (tmp_path / "log").read_text()
    assert code != 0, said
    assert not list(tmp_path.rglob("result.json")), "a job that failed has not finished"
    if how == "raises":
        assert "ZeroDivisionError: no such luck" in said
        assert "rank 1 failed: ZeroDivisionError: no such luck" in said, "what rank 0 says"
    assert not left, "a process stayed behind"


def _end_session(session):
    """Whether processes of it are left after a while, which are killed."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(session, 0)
            time.sleep(0.1)
        os.killpg(session, signal.SIGKILL)
        return True
    return False
