"""A snapshot as scalars for a logger, and as the rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.dashboard.history import TABLES, RunHistory, Table
from bnkit.dashboard.keys import per_layer
from bnkit.moments import to_float64
from bnkit.monitoring.snapshot import LayerMeasures, Snapshot
from bnkit.norms import spec_of
from bnkit.report import RecalibrationReport

__all__ = ["add_recalibration", "dropout_scalars", "kind", "layer_table", "recalibration_scalars", "snapshot_scalars"]

_ROWS = 20_000
"""At most so many rows of recalibrations are kept: older ones go first."""
_CHANNELS = 4_096
"""At most about so many channels, of all layers together, are kept one by one: evenly spaced ones."""

_PREFIXES = {
    "bn_shift": "mean_shift",
    "bn_variance": "log_variance_ratio",
    "bn_kl": "kl",
    "bn_drift": "drift",
    "bn_noise": "noise",
}


def snapshot_scalars(
    snapshot: Snapshot, layers: Mapping[str, _BatchNorm], names: Mapping[str, str], alarms: int
) -> dict[str, float]:
    """What is logged of a snapshot: see [`bnkit.dashboard.keys`][]. What is not known is left out.

    Args:
        snapshot: of a [`bnkit.Monitor`][].
        layers: the model's, by name.
        names: of [`bnkit.dashboard.keys.short_names`][].
        alarms: raised so far.
    """
    measures = snapshot.layers
    column = {field: [getattr(m, field) for m in measures.values()] for field in LayerMeasures._fields}
    dead = [(m.dead_fraction, layers[name].num_features) for name, m in measures.items()]
    channels = sum(width for fraction, width in dead if not math.isnan(fraction))
    scalars = {
        "bn/shift_median": _median(column["mean_shift"]),
        "bn/shift_worst": _worst(column["mean_shift"]),
        "bn/kl_median": _median(column["kl"]),
        "bn/kl_worst": _worst(column["kl"]),
        "bn/drift_median": _median(column["drift"]),
        "bn/drift_worst": _worst(column["drift"]),
        "bn/alarms": float(alarms),
        "bn/dead_fraction": sum(f * width for f, width in dead if not math.isnan(f)) / channels
        if channels
        else math.nan,
        "bn/nonfinite_layers": float(column["finite"].count(False))
        if any(finite is not None for finite in column["finite"])
        else math.nan,
        "bn/unknown_layers": float(sum(m.source.startswith("unknown") for m in measures.values())),
        "bn/weight_median": _median(column["weight"]),
        "bn/bias_median": _median(column["bias"]),
        "bn/batch_noise": _median(column["noise"]),
        "bn/normalization_batch_size": _median(column["normalization_batch_size"]),
    }
    for prefix, field in _PREFIXES.items():
        scalars |= per_layer(prefix, {name: getattr(m, field) for name, m in measures.items()}, names)
    return {key: value for key, value in scalars.items() if math.isfinite(value)}


def recalibration_scalars(report: RecalibrationReport, names: Mapping[str, str]) -> dict[str, float]:
    """How far each layer's running mean was off from the population's, ``bn_estimation/<layer>``."""
    return per_layer("bn_estimation", {name: layer.shift for name, layer in report.layers.items()}, names)


def dropout_scalars(shifts: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """How much dropout changed the layers' variance in a step, ``bn_dropout/<layer>``, and the worst of it."""
    scalars = {"bn/dropout_shift_worst": _worst(map(abs, shifts.values())), **per_layer("bn_dropout", shifts, names)}
    return {key: value for key, value in scalars.items() if math.isfinite(value)}


def kind(layer: _BatchNorm) -> str:
    """What a layer is, in a word: the variant's spec, or the name of its class."""
    return str(spec_of(layer) or type(layer).__name__)


def add_recalibration(
    history: RunHistory, report: RecalibrationReport, layers: Mapping[str, _BatchNorm], step: int
) -> None:
    """Add a recalibration to the tables.

    Args:
        history: gets rows for each layer, and for its channels those of this recalibration alone.
        report: what was found.
        layers: the model's, by name.
        step: when.
    """
    table = history.tables["recalibrations"]
    for name, layer in report.layers.items():
        table.add(
            step=step,
            layer=name,
            mean_shift=layer.shift,
            log_variance_ratio=float(layer.var_ratio.clamp_min(1e-300).log().mean()),
            standard_error=float((layer.standard_error / _old_std(report, layers, name)).square().mean().sqrt()),
            source=layer.source,
        )
    del table.rows[:-_ROWS]
    channels = history.tables["channels"] = Table(TABLES["channels"])
    at_most = max(4, _CHANNELS // max(1, len(report.layers)))
    for name, (mean, var) in report.before.items():
        # From the report, and not from the model: weight averaging may have put other statistics there since.
        found, eps = report.layers[name], layers[name].eps
        mean, var = to_float64(mean).cpu(), to_float64(var).cpu()
        new_mean = (mean + found.mean_shift * _old_std(report, layers, name)).tolist()
        new_var = (found.var_ratio * (var + eps) - eps).clamp_min(0).tolist()
        old_mean, old_var = mean.tolist(), var.tolist()
        for channel in range(0, len(old_mean), math.ceil(len(old_mean) / at_most)):
            channels.add(
                layer=name,
                channel=channel,
                running_mean=old_mean[channel],
                running_var=old_var[channel],
                population_mean=new_mean[channel],
                population_var=new_var[channel],
            )


def layer_table(
    snapshot: Snapshot,
    layers: Mapping[str, _BatchNorm],
    *,
    estimation_shift: Mapping[str, float],
    dropout_shift: Mapping[str, float],
    alarms: Iterable[str],
) -> Table:
    """The table of all layers with all measures.

    Args:
        snapshot: the last.
        layers: the model's, by name.
        estimation_shift: of the last recalibration, by layer.
        dropout_shift: of the last probe, by layer.
        alarms: the layer of each alarm of the run.
    """
    table = Table(TABLES["layers"])
    raised = list(alarms)
    for name, m in snapshot.layers.items():
        layer = layers[name]
        table.add(
            layer=name,
            kind=kind(layer),
            channels=layer.num_features,
            source=m.source,
            mean_shift=m.mean_shift,
            log_variance_ratio=m.log_variance_ratio,
            kl=m.kl,
            wasserstein2=m.wasserstein2,
            psi=m.psi,
            drift=m.drift,
            batch_noise=m.noise,
            normalization_batch_size=m.normalization_batch_size,
            estimation_shift=estimation_shift.get(name),
            dropout_shift=dropout_shift.get(name),
            dead_fraction=m.dead_fraction,
            weight=m.weight,
            bias=m.bias,
            finite=m.finite,
            alarms=raised.count(name),
        )
    return table


def _old_std(report: RecalibrationReport, layers: Mapping[str, _BatchNorm], name: str) -> Tensor:
    return (to_float64(report.before[name][1]).cpu() + layers[name].eps).sqrt()


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return median(known) if known else math.nan


def _worst(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)
