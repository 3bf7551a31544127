"""bnkit makes Batch Normalization trustworthy.

The functions here serve any PyTorch loop; ``bnkit.callbacks`` has the same for PyTorch Lightning. Importing ``bnkit``
imports torch alone.
"""

from bnkit.moments import Moments
from bnkit.observation import Observation, observe
from bnkit.recalibration import recalibrate
from bnkit.report import LayerReport, RecalibrationReport
from bnkit.running import running_statistics

__all__ = [
    "LayerReport",
    "Moments",
    "Observation",
    "RecalibrationReport",
    "observe",
    "recalibrate",
    "running_statistics",
]
