"""Small LightningModules and trainers, and the functions that tests run in other processes."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from helpers.references import ConvNet


class Images(Dataset):
    """Deterministic images whose statistics depend on the label; remembers nothing."""

    def __init__(self, length=48, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(length) % 3
        self.x = torch.randn(length, 2, 8, 8, generator=generator) + self.y.view(-1, 1, 1, 1)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Classifier(LightningModule):
    """Trains a ConvNet, and notes the statistics that each validation used."""

    def __init__(self, dropout=0.0, lr=0.1):
        super().__init__()
        self.net = ConvNet(dropout=dropout)
        self.lr = lr
        self.validated = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append({name: value.clone() for name, value in self.state_dict().items()})
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(batch_size=4, shuffle=True, length=48, **options):
    return DataLoader(Images(length), batch_size=batch_size, shuffle=shuffle, **options)


def trainer(folder, callbacks=(), **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "num_sanity_val_steps": 2,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | options))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
