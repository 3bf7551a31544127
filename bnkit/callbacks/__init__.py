"""bnkit for PyTorch Lightning: thin callbacks that say when; the functions that they call say how."""

from bnkit.callbacks.adaptation import BatchNormAdaptation
from bnkit.callbacks.diagnosis import BatchNormDiagnosis
from bnkit.callbacks.recalibration import BatchNormRecalibration
from bnkit.callbacks.shift_monitor import ActivationShiftMonitor
from bnkit.callbacks.swap import BatchNormSwap

__all__ = [
    "ActivationShiftMonitor",
    "BatchNormAdaptation",
    "BatchNormDiagnosis",
    "BatchNormRecalibration",
    "BatchNormSwap",
]
