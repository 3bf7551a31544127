"""Running the user's module for a callback's own purpose: what its forward logs is not mixed with its steps'."""

import pytest
import torch
from helpers.lightning_models import Classifier, loader, trainer
from lightning.pytorch import seed_everything

from bnkit.callbacks import BatchNormAdaptation, BatchNormDiagnosis, BatchNormRecalibration
from bnkit.callbacks.own_forward import own_forward

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


class Logging(Classifier):
    """Logs in its forward, as is right in a step and refused in most hooks."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        out = self.net(x)
        self.log("mean", x.mean(), **self.options)
        self.log_dict({"largest": x.max()}, **self.options)
        self.log("one", 1.0)  # no tensor: it can be logged while the forward is traced
        return out

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


def logged(folder, callbacks, options, verb):
    seed_everything(7, verbose=False)
    model = Logging(**options)
    engine = trainer(folder, callbacks, max_epochs=1)
    if verb == "fit":
        engine.fit(model, loader(), loader(shuffle=False))
    else:
        engine.test(model, loader(shuffle=False), verbose=False)
    assert "log" not in model.__dict__
    assert "log_dict" not in model.__dict__
    return {name: value for name, value in engine.callback_metrics.items() if not name.startswith("bn/")}


class Tested(Logging):
    def test_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize("options", [{}, {"on_step": True, "on_epoch": True}], ids=["default", "step"])
@pytest.mark.parametrize(
    ("callback", "verb"),
    [(BatchNormDiagnosis, "fit"), (BatchNormRecalibration, "fit"), (BatchNormAdaptation, "test")],
)
def test_what_a_forward_logs_is_that_of_the_steps_alone(tmp_path, monkeypatch, callback, verb, options):
    monkeypatch.setattr(Logging, "test_step", Tested.test_step)
    expected = logged(tmp_path, [], options, verb)
    ours = callback()
    assert logged(tmp_path, [ours], options, verb) == expected
    if callback is BatchNormDiagnosis:  # the sample went through, though the forward logs where it may not
        assert any("as the sample tells" in str(finding) for finding in ours.findings)


def test_logging_works_again_after_an_error(tmp_path):
    model = Logging()
    model.__dict__["log"] = mine = lambda *_, **__: None

    def fails(model, batch):
        assert model.log is not mine
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_forward(trainer(tmp_path), fails)(model, torch.zeros(1))
    assert model.log is mine
    assert "log_dict" not in model.__dict__
