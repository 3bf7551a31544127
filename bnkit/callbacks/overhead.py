"""What a monitor costs, measured where it runs."""

from __future__ import annotations

import math
import time

__all__ = ["Overhead"]


class Overhead:
    """CPU time of the training steps, and of the monitor within them.

    Attributes:
        logging: CPU time spent on logging so far, in seconds, which is no part of the steps.
    """

    def __init__(self) -> None:
        self.logging = 0.0
        self._steps = self._began = self._last_steps = self._last_own = 0.0

    def start(self) -> None:
        """A step begins."""
        self._began = time.process_time()

    def stop(self) -> None:
        """A step ends."""
        self._steps += time.process_time() - self._began

    def share(self, monitor: float) -> float:
        """The monitor's CPU time over that of the steps without it, since the last time that this was asked.

        Args:
            monitor: seconds that the monitor took within the steps so far.

        Returns:
            At least 0; NaN where no step took time.
        """
        own = monitor + self.logging
        steps = self._steps + self.logging
        without = (steps - self._last_steps) - (own - self._last_own)
        share = (own - self._last_own) / without if without > 0 else math.nan
        self._last_steps, self._last_own = steps, own
        return share
