"""bnkit in a Lightning Fabric loop over several processes, on scikit-learn's digits.

    python examples/fabric.py --devices 2 --epochs 2
    python examples/fabric.py --devices 2 --sync

Fabric starts the processes (on the CPU, over gloo). bnkit takes the model and the loaders as Fabric returns them. Of
the statistics it shows that DistributedDataParallel leaves each process its own, which only the next training forward
makes one, and that all have the same bits after the recalibration. ``--sync`` normalises over the batches of all
processes. ``--out`` is where the last epoch's checkpoint goes.
"""

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnkit


def network() -> nn.Sequential:
    """Two convolutions with BatchNorm, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def data() -> tuple[TensorDataset, TensorDataset]:
    """1,408 images to train with, and 388 of other writers to validate with."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    return TensorDataset(images[:1408], labels[:1408]), TensorDataset(images[1408:1796], labels[1408:1796])


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    """In per cent, over all processes."""
    model.eval()
    right = torch.stack([(model(x).argmax(1) == y).float().mean() for x, y in loader])  # batches of one size
    return 100 * float(fabric.all_reduce(right.mean()))


def spread(fabric: Fabric, model: nn.Module) -> float:
    """How far this process's running means are from the mean over all processes, at most."""
    means = torch.cat([layer.running_mean for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)])
    return float((fabric.all_reduce(means.clone()) - means).abs().max())


def main() -> None:
    """Train, validate each epoch, and save a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine's CPU")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--sync", action="store_true", help="normalise over the batches of all processes")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the checkpoint")
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    train_set, val_set = data()
    model = network()
    if args.sync:
        fabric.print(bnkit.swap(model, bnkit.norms.Sync()).table())
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9))
    train_loader = fabric.setup_dataloaders(DataLoader(train_set, args.batch_size, shuffle=True))
    val_loader = fabric.setup_dataloaders(DataLoader(val_set, 97))

    for finding in bnkit.diagnose(model, optimizer=optimizer, batch_size=args.batch_size, world_size=args.devices):
        fabric.print(finding)
    monitor = bnkit.Monitor(model, every_n_steps=20, across_ranks=args.devices > 1)
    step = 0
    for epoch in range(args.epochs):
        model.train()
        for x, y in train_loader:
            monitor.before()
            loss = F.cross_entropy(model(x), y)
            monitor.after(step, samples=len(x))
            for alarm in monitor.new_alarms():
                fabric.print(f"step {alarm.step}: {alarm.message}")
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1

        apart, by_average = spread(fabric, model), accuracy(fabric, model, val_loader)
        bnkit.recalibrate(model, train_loader)
        recalibrated = accuracy(fabric, model, val_loader)
        fabric.print(
            f"epoch {epoch}: {by_average:.2f} % by the running average, {recalibrated:.2f} % recalibrated; "
            f"the processes' running means differ by {apart:.2g}, then by {spread(fabric, model):.2g}"
        )
    monitor.close()
    fabric.save(args.out / "last.ckpt", {"model": model, "accuracy": recalibrated})
    fabric.print(f"Saved {args.out / 'last.ckpt'}: {recalibrated:.2f} %")


if __name__ == "__main__":
    main()
