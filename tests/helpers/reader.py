"""What the reader of README and of the how-to pages is taken to have: a trained model and its data."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset


class Model(nn.Module):
    """A convolutional network with BatchNorm in its backbone and its neck."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.neck = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


def belongings(lr: float = 0.4) -> dict[str, Any]:
    """The names that a page may use. At this learning rate the weights move faster than the running average follows."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_data, validation_data = (
        TensorDataset(images[:1200], labels[:1200]),
        TensorDataset(images[1200:], labels[1200:]),
    )
    train_loader = DataLoader(train_data, batch_size=32, shuffle=True)
    validation_loader = DataLoader(validation_data, batch_size=64)

    def train(model: nn.Module, batches: Any = train_loader, lr: float = lr, epochs: int = 1) -> AveragedModel:
        """Returns the exponential moving average of the weights."""
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        model.train()
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                averaged.update_parameters(model)
        return averaged

    @torch.no_grad()
    def accuracy(model: nn.Module, batches: Any = validation_loader) -> float:
        """In per cent."""
        was = model.training
        model.eval()
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
        model.train(was)
        return 100 * right / sum(len(y) for _, y in batches)

    torch.manual_seed(0)
    model = Model()
    averaged = train(model)
    return {
        "model": model,
        "averaged": averaged,
        "train": train,
        "accuracy": accuracy,
        "train_data": train_data,
        "train_loader": train_loader,
        "validation_loader": validation_loader,
    }
