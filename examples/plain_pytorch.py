"""bnkit in a training loop of plain PyTorch, on scikit-learn's digits.

    python examples/plain_pytorch.py --epochs 2
    python examples/plain_pytorch.py --ghost 8

What bnkit does in it, each in a line or two: a diagnosis before training, ghost batches where ``--ghost`` asks for
them, a monitor around each step, statistics of the training data before each validation, and plain BatchNorm in what
is exported. The folder ``--out`` gets a checkpoint of every epoch, with the statistics that it was validated with, and
``model.pt``, the weights for a program that knows nothing of bnkit.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnkit


def network() -> nn.Sequential:
    """Three convolutions with BatchNorm, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def data() -> tuple[TensorDataset, TensorDataset]:
    """1,408 images to train with, and the other 389, of other writers, to validate with."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    return TensorDataset(images[:1408], labels[:1408]), TensorDataset(images[1408:], labels[1408:])


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """In per cent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return 100 * right / len(loader.dataset)


def main() -> None:
    """Train, validate and save a checkpoint each epoch, and export the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ghost", type=int, metavar="SIZE", help="normalise by ghost batches of this size")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for what is saved")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_set, val_set = data()
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True)
    val_loader = DataLoader(val_set, 128)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    if args.ghost:
        print(bnkit.swap(model, bnkit.norms.Ghost(args.ghost)).table())
    sample = next(iter(train_loader))
    for finding in bnkit.diagnose(model, optimizer=optimizer, batch_size=args.batch_size, sample=sample):
        print(finding)

    monitor = bnkit.Monitor(model, every_n_steps=20)
    args.out.mkdir(parents=True, exist_ok=True)
    step = 0
    for epoch in range(args.epochs):
        model.train()
        for x, y in train_loader:
            monitor.before()
            loss = F.cross_entropy(model(x), y)
            monitor.after(step, samples=len(x))
            for alarm in monitor.new_alarms():
                print(f"step {alarm.step}: {alarm.message}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

        by_average = accuracy(model, val_loader)
        report = bnkit.recalibrate(model, train_loader)
        recalibrated = accuracy(model, val_loader)
        print(f"epoch {epoch}: {by_average:.2f} % by the running average, {recalibrated:.2f} % recalibrated")
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "accuracy": recalibrated}
        torch.save(checkpoint, args.out / f"epoch{epoch}.ckpt")

    monitor.close()
    print(report.table())
    bnkit.revert(model)
    torch.save(model.state_dict(), args.out / "model.pt")
    print(f"Exported {args.out / 'model.pt'}: {accuracy(model, val_loader):.2f} %")


if __name__ == "__main__":
    main()
