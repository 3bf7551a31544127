"""The reference job: real data, a small network, a LightningModule, and what ``scripts/`` runs."""

from bnkit.training.adaptation import run_adaptation
from bnkit.training.checkpoint import recalibrate_checkpoint
from bnkit.training.classifier import ImageClassifier
from bnkit.training.comparison import Comparison, StatisticsComparison
from bnkit.training.digit_sources import CroppedMNISTDigits, MNISTDigits
from bnkit.training.digits import Digits
from bnkit.training.fashion_mnist import FashionMNIST
from bnkit.training.faults import DeadLayer, FrozenLayer, NotANumber, ShiftedInputs
from bnkit.training.images import ImageData, ImageDataset
from bnkit.training.job import run
from bnkit.training.resnet import BasicBlock, ResNet
from bnkit.training.study import run_study

__all__ = [
    "BasicBlock",
    "Comparison",
    "CroppedMNISTDigits",
    "DeadLayer",
    "Digits",
    "FashionMNIST",
    "FrozenLayer",
    "ImageClassifier",
    "ImageData",
    "ImageDataset",
    "MNISTDigits",
    "NotANumber",
    "ResNet",
    "ShiftedInputs",
    "StatisticsComparison",
    "recalibrate_checkpoint",
    "run",
    "run_adaptation",
    "run_study",
]
