"""Watching what every BatchNorm layer normalises, at every training step."""

from bnkit.monitoring.alarms import Alarm
from bnkit.monitoring.monitor import Monitor, check_arguments
from bnkit.monitoring.snapshot import LayerMeasures, Snapshot

__all__ = ["Alarm", "LayerMeasures", "Monitor", "Snapshot", "check_arguments"]
