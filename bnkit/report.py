"""What a recalibration found: how far the running statistics were off, layer by layer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from bnkit.observation import Source

__all__ = ["LayerReport", "RecalibrationReport"]


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One recalibrated layer. Tensors are float64, shape (C,), on the CPU; "old" is before the recalibration.

    Attributes:
        mean_shift: (new mean - old mean) / sqrt(old variance + eps): in standard deviations of the layer's output.
        var_ratio: (new variance + eps) / (old variance + eps).
        standard_error: standard error of the mean of what was seen, from the spread of the batch means, in the
            activation's own unit; infinite where fewer than two batches were seen. See ``Moments.standard_error``.
        source: ``"layer"`` where the layer's own batch statistics were read, ``"input"`` where its input was reduced.
    """

    mean_shift: Tensor
    var_ratio: Tensor
    standard_error: Tensor
    source: Source

    @property
    def shift(self) -> float:
        """How far the running mean was off: root mean square of ``mean_shift`` over the channels, >= 0."""
        return float(self.mean_shift.square().mean().sqrt())


class Worst(NamedTuple):
    """The layer whose running mean was off most, and by how many standard deviations (rms over its channels)."""

    layer: str
    shift: float


@dataclass(frozen=True, eq=False)
class RecalibrationReport:
    """The result of [`bnkit.recalibrate`][].

    Attributes:
        samples: samples that went through the model, over all ranks.
        batches: batches, over all ranks.
        skipped: batches left out because a statistic was not finite, over all ranks.
        passes: times that the model went over the data.
        seconds: wall-clock time on this rank.
        layers: the recalibrated layers by name.
        kept: the layers that were left as they were: name -> why.
        before: running statistics (mean, variance) of the recalibrated layers before; see
            [`bnkit.running_statistics`][].
    """

    samples: int
    batches: int
    skipped: int
    passes: int
    seconds: float
    layers: dict[str, LayerReport]
    kept: dict[str, str]
    before: dict[str, tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def median_shift(self) -> float:
        """Median over the layers of [`bnkit.LayerReport.shift`][]; NaN where no layer was recalibrated."""
        return statistics.median(layer.shift for layer in self.layers.values()) if self.layers else float("nan")

    @property
    def worst(self) -> Worst | None:
        """The layer that was off most; None where no layer was recalibrated."""
        return max(
            (Worst(name, layer.shift) for name, layer in self.layers.items()), key=lambda w: w.shift, default=None
        )

    def table(self) -> str:
        """A plain-text table, a line a layer in the model's order, with a closing line."""
        header = ("layer", "channels", "mean shift (std)", "variance ratio", "standard error", "read from")
        rows = [header]
        for name, layer in self.layers.items():
            ratio = layer.var_ratio.clamp_min(1e-300).log().mean().exp()
            rows.append(
                (
                    name,
                    str(len(layer.mean_shift)),
                    f"{layer.shift:.3g}",
                    f"{ratio:.3g}",
                    f"{layer.standard_error.max():.2g}",
                    layer.source,
                )
            )
        rows += [(name, "", "", "", "", f"kept: {why}") for name, why in self.kept.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:], strict=True))]
            )
            + f"  {row[-1]}"
            for row in rows
        ]
        passes = f", {self.passes} passes" if self.passes > 1 else ""
        skipped = f", {self.skipped} skipped as not finite" if self.skipped else ""
        closing = f"{self.samples} samples in {self.batches} batches{passes}{skipped}, {self.seconds:.2f} s"
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], closing])

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only, ready for JSON; an infinite or NaN number becomes None."""
        return {
            "samples": self.samples,
            "batches": self.batches,
            "skipped": self.skipped,
            "passes": self.passes,
            "seconds": self.seconds,
            "median_shift": _json_number(self.median_shift),
            "worst_layer": self.worst.layer if self.worst else None,
            "worst_shift": _json_number(self.worst.shift) if self.worst else None,
            "layers": {
                name: {
                    "mean_shift": _json_numbers(layer.mean_shift),
                    "var_ratio": _json_numbers(layer.var_ratio),
                    "standard_error": _json_numbers(layer.standard_error),
                    "source": layer.source,
                }
                for name, layer in self.layers.items()
            },
            "kept": dict(self.kept),
        }


def _json_number(value: float) -> float | None:
    return value if value - value == 0 else None  # inf - inf and NaN - NaN are NaN


def _json_numbers(values: Tensor) -> list[float | None]:
    return [_json_number(value) for value in values.tolist()]
