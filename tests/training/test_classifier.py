from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

from bnkit.training import Digits, ImageClassifier, ResNet

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def classifier(**options):
    return ImageClassifier(
        ResNet(width=4, depths=[1]), num_classes=10, optimizer=partial(torch.optim.SGD, lr=0.1), **options
    )


def test_a_training_step_is_the_cross_entropy_of_the_logits():
    module = classifier()
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    module.log = lambda *_, **__: None
    loss = module.training_step((images, labels), 0)
    assert torch.equal(loss, F.cross_entropy(module(images), labels))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_fit_logs_keys_with_one_slash_and_accuracy_over_all_images(tmp_path):
    torch.manual_seed(0)
    module, data = classifier(), Digits(batch_size=16, eval_batch_size=100)
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=5, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    metrics = trainer.callback_metrics
    assert set(metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    module.eval()
    validation = data.split("validation")
    with torch.no_grad():
        logits = module(validation.images)
    assert torch.allclose(metrics["val/accuracy"], (logits.argmax(1) == validation.labels).float().mean())
    assert torch.allclose(metrics["val/loss"], F.cross_entropy(logits, validation.labels), atol=1e-5)
    trainer.test(module, datamodule=data, verbose=False)
    assert set(trainer.callback_metrics) == {"test/loss", "test/accuracy"}


def test_the_scheduler_steps_after_each_epoch():
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = classifier(scheduler=scheduler)
    trainer = Trainer(**QUIET, max_epochs=2, limit_train_batches=3, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, datamodule=Digits(batch_size=4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**2


def test_a_checkpoint_holds_no_objects_and_fills_a_new_module(tmp_path):
    module = classifier()
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=3, limit_val_batches=1, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=Digits(batch_size=4))
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert checkpoint["hyper_parameters"] == {"num_classes": 10}
    other = classifier()
    other.load_state_dict(checkpoint["state_dict"], strict=True)
    module.eval()
    other.eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(module(x), other(x))


def test_any_network_will_do():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module = ImageClassifier(network, num_classes=10, optimizer=torch.optim.Adam)
    trainer = Trainer(**QUIET, fast_dev_run=True)
    trainer.fit(module, datamodule=Digits(batch_size=4))
    assert trainer.state.finished
