"""bnkit makes Batch Normalization trustworthy.

The functions here serve any PyTorch loop; ``bnkit.callbacks`` has the same for PyTorch Lightning. Importing ``bnkit``
imports torch alone.
"""

from bnkit import norms, shift
from bnkit.conversion import Conversion
from bnkit.diagnosis import Finding, diagnose
from bnkit.moments import Moments
from bnkit.monitoring import Monitor
from bnkit.norms import register_adapter
from bnkit.observation import Observation, observe
from bnkit.recalibration import recalibrate
from bnkit.report import LayerReport, RecalibrationReport
from bnkit.running import running_statistics
from bnkit.swapping import revert, swap

__all__ = [
    "Conversion",
    "Finding",
    "LayerReport",
    "Moments",
    "Monitor",
    "Observation",
    "RecalibrationReport",
    "diagnose",
    "norms",
    "observe",
    "recalibrate",
    "register_adapter",
    "revert",
    "running_statistics",
    "shift",
    "swap",
]
