import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class DigitsDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, train_size: int = 800):
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str):
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        data = TensorDataset(x, torch.tensor(digits.target))
        size = self.hparams.train_size
        self.data_train, self.data_val, self.data_test = (
            torch.utils.data.Subset(data, part)
            for part in (range(size), range(size, size + 300), range(size + 300, len(data)))
        )

    def train_dataloader(self):
        return DataLoader(self.data_train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data_val, batch_size=100)

    def test_dataloader(self):
        return DataLoader(self.data_test, batch_size=100)
