"""Every callback and every spec in the YAML of LightningCLI: read, checked, printed, saved and read again."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import pytest
import torch
import yaml
from helpers.lightning_models import Classifier, loader
from lightning.pytorch.cli import LightningCLI

from bnkit import callbacks, norms
from bnkit.norms import Domain, Frozen, Ghost, Group, MovingAverage, NormBatch, Renorm, Spec, Sync

HERE = __name__


def my_forward(model, batch):
    return model(batch[0])


def my_loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch[1])


def my_batches():
    return [(torch.randn(4, 2, 8, 8), torch.zeros(4).long())]


FORWARD, LOSS, BATCHES = (f"{HERE}.{function.__name__}" for function in (my_forward, my_loss, my_batches))

SPECS = {
    Domain: {"names": ["day", "night"]},
    Frozen: {"affine": False},
    Ghost: {"size": 4, "grouping": "contiguous"},
    Group: {"num_groups": 2, "fold": False, "weight_standardization": True},
    MovingAverage: {"window": 2, "warmup_steps": 3, "renorm_steps": 4, "r_max": 2.5, "center_weights": False},
    NormBatch: {"size": 8, "rounding": "nearest"},
    Renorm: {"r_max": 2.5, "d_max": 1.5, "warmup_steps": 7},
    Sync: {"group_size": 2},
}
CALLBACKS = {
    "ActivationShiftMonitor": {
        "every_n_steps": 7,
        "gap_every_n_steps": 3,
        "covariate_shift_every_n_steps": 4,
        "input_every_n_steps": 5,
        "false_alarms_per_1000_steps": 1.5,
        "window": 30,
        "noise_level": 0.25,
        "across_ranks": True,
        "forward": my_forward,
        "loss": my_loss,
        "report": False,
        "report_dir": "pages",
    },
    "BatchNormAdaptation": {
        "prior_samples": 2.5,
        "max_samples": 50,
        "tolerance": 0.5,
        "consistency": "population",
        "on_nonfinite": "skip",
        "dataloaders": [1, "night"],
        "forward": my_forward,
        "progress": True,
    },
    "BatchNormDiagnosis": {"fail_on": "warning", "sample": False, "ignore": ["BN101"], "forward": my_forward},
    "BatchNormRecalibration": {
        "every_n_epochs": 3,
        "every_n_steps": 7,
        "at_fit_end": False,
        "dataloader": my_batches,
        "forward": my_forward,
        "max_samples": None,
        "tolerance": 0.5,
        "prior_samples": 2.5,
        "consistency": "population",
        "on_nonfinite": "skip",
        "progress": True,
    },
    "BatchNormSwap": {
        # the order of the patterns matters, and is not that of the alphabet
        "rules": {"net.bn2": None, "net.bn1": Ghost(4), "*": Renorm(2.5)},
        "schedule": {5: {"net.*": None, "*": Frozen(affine=False)}, 0.5: None, 3: Frozen()},
        "on_unknown": "skip",
        "device_batch": 4,
        "convolutions": {"net.bn1": "net.conv1"},
    },
}


def written(value):
    """As a user writes it in YAML."""
    if isinstance(value, Spec):
        arguments = {field.name: written(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": f"bnkit.norms.{type(value).__name__}", "init_args": arguments}
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [written(item) for item in value]
    return f"{HERE}.{value.__name__}" if callable(value) else value


def state(value):
    """All that an object holds, in order, for comparison."""
    if isinstance(value, dict):
        return [(state(key), state(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [state(item) for item in value]
    if hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.isroutine(value):
        return type(value), state(vars(value))
    return value


def read(folder, config, *arguments, run=False):
    """The callbacks of bnkit that LightningCLI builds from a config, in a project's own script."""
    path = folder / "read.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    command = ["fit"] if run else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(
            Classifier,
            run=run,
            args=[*command, "--config", str(path), *arguments],
            **({} if run else {"save_config_callback": None}),
        )
    return [callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith("bnkit.")]


def config(*entries, **trainer):
    given = [{"class_path": f"bnkit.callbacks.{name}", "init_args": written(arguments)} for name, arguments in entries]
    return {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": given, **trainer}}


def printed(folder, given, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        read(folder, given, "--print_config")
    assert not ended.value.code
    return capsys.readouterr().out


def refusal(folder, given, capsys):
    """What the user is told."""
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as refused:
        read(folder, given)
    assert not (isinstance(refused.value, SystemExit) and not refused.value.code)
    return capsys.readouterr().err + str(refused.value)


def test_the_tables_here_have_every_callback_and_spec_and_each_knob_off_its_default():
    public = [getattr(norms, name) for name in norms.__all__]
    assert set(SPECS) == {spec for spec in public if isinstance(spec, type) and issubclass(spec, Spec)} - {Spec}
    assert set(CALLBACKS) == set(callbacks.__all__)
    tables = {**{getattr(callbacks, name): arguments for name, arguments in CALLBACKS.items()}, **SPECS}
    for cls, arguments in tables.items():
        parameters = inspect.signature(cls).parameters
        assert set(arguments) == set(parameters)
        assert [name for name, value in arguments.items() if parameters[name].default == value] == []


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_is_built_from_yaml_and_again_from_what_is_printed(tmp_path, name, capsys):
    expected = state(getattr(callbacks, name)(**CALLBACKS[name]))
    given = config((name, CALLBACKS[name]))
    [built] = read(tmp_path, given)
    assert state(built) == expected
    [again] = read(tmp_path, printed(tmp_path, given, capsys))
    assert state(again) == expected


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_needs_no_arguments(tmp_path, name):
    [built] = read(tmp_path, config((name, {})))
    assert state(built) == state(getattr(callbacks, name)())


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_built_from_yaml_and_again_from_what_is_printed(tmp_path, spec, capsys):
    value = spec(**SPECS[spec])
    given = config(("BatchNormSwap", {"rules": value, "schedule": {2: {"net.*": None, "*": value}}}))
    expected = {0: {"*": value}, 2: {"net.*": None, "*": value}}
    [built] = read(tmp_path, given)
    [again] = read(tmp_path, printed(tmp_path, given, capsys))
    assert state(built.schedule._stages) == state(again.schedule._stages) == state(expected)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ActivationShiftMonitor", {"window": "long"}, 'key "window"'),
        ("ActivationShiftMonitor", {"noise_level": 0}, "noise_level must"),
        ("ActivationShiftMonitor", {"loss": f"{HERE}.no_such_loss"}, "has no attribute 'no_such_loss'"),
        ("BatchNormAdaptation", {"prior_samples": -1}, "prior_samples must"),
        ("BatchNormAdaptation", {"dataloaders": "night"}, "dataloaders"),
        ("BatchNormDiagnosis", {"fail_on": "anything"}, 'key "fail_on"'),
        ("BatchNormRecalibration", {"consistency": "both"}, 'key "consistency"'),
        ("BatchNormRecalibration", {"max_samples": -3}, "max_samples must be at least 1"),
        ("BatchNormRecalibration", {"every_n_epoch": 1}, "'every_n_epoch' is not accepted"),
        ("BatchNormSwap", {"on_unknown": "guess"}, 'key "on_unknown"'),
        ("BatchNormSwap", {"rules": {"class_path": "bnkit.norms.Ghostly"}}, "'bnkit.norms.Ghostly' is not a spec"),
        ("BatchNormSwap", {"rules": "Ghostly(4)"}, "'Ghostly' is not a spec; there are Domain, Frozen, Ghost"),
        (
            "BatchNormSwap",
            {"rules": {"class_path": "bnkit.norms.Ghost", "init_args": {"sizes": 4}}},
            "'sizes' is not accepted",
        ),
        (
            "BatchNormSwap",
            {"rules": {"net.*": {"class_path": "bnkit.norms.Ghost", "init_args": {"size": 0}}}},
            "Ghost's size is a number of samples, an int of at least 1, not 0",
        ),
        ("BatchNormSwap", {"schedule": {"soon": "Frozen"}}, "A schedule's key is an epoch"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, name, arguments, message, capsys):
    assert message in refusal(tmp_path, config((name, arguments)), capsys)


def test_a_fit_saves_the_callbacks_in_its_config_and_can_be_started_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "train_dataloader", lambda self: loader(), raising=False)
    monkeypatch.setattr(Classifier, "val_dataloader", lambda self: loader(shuffle=False), raising=False)
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""}}
    entries = [
        ("BatchNormRecalibration", {"forward": my_forward}),
        ("BatchNormSwap", {"rules": {"net.bn2": None, "*": Ghost(2)}, "schedule": {1: Frozen()}}),
        ("ActivationShiftMonitor", {"every_n_steps": 2, "report_dir": str(tmp_path)}),
    ]
    options = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "logger": logger}
    fitted = {type(callback): callback for callback in read(tmp_path, config(*entries, **options), run=True)}
    assert fitted[callbacks.BatchNormRecalibration].report is not None
    assert (tmp_path / "report.html").is_file()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [entry["class_path"].rsplit(".", 1)[1] for entry in saved["trainer"]["callbacks"]] == [
        name for name, _ in entries
    ]
    again = read(tmp_path, {"trainer": saved["trainer"]})
    assert [state(callback) for callback in again] == [
        state(getattr(callbacks, name)(**arguments)) for name, arguments in entries
    ]
