"""What is logged, under which name: the one list that the callback, the W&B workspace and the page share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

__all__ = ["LAYER_KEYS", "MODEL_KEYS", "LayerKey", "ModelKey", "Section", "per_layer", "short_names"]

Section = Literal["BN health", "Where", "Why", "Cost"]


class ModelKey(NamedTuple):
    """A scalar of the whole model: ``bn/<name>``."""

    key: str
    section: Section
    title: str
    unit: str
    meaning: str


class LayerKey(NamedTuple):
    """A scalar of each layer: ``<prefix>/<layer>``, with one slash and no dots."""

    prefix: str
    title: str
    unit: str
    meaning: str


_STD = "running std"

MODEL_KEYS = (
    ModelKey("bn/shift_median", "BN health", "Mean shift, median layer", _STD, "batch means against running means"),
    ModelKey("bn/shift_worst", "BN health", "Mean shift, worst layer", _STD, "batch means against running means"),
    ModelKey("bn/kl_median", "BN health", "KL divergence, median layer", "nats", "batch against running statistics"),
    ModelKey("bn/kl_worst", "BN health", "KL divergence, worst layer", "nats", "batch against running statistics"),
    ModelKey("bn/drift_median", "BN health", "Drift, median layer", "std", "fast against slow average of the batches"),
    ModelKey("bn/drift_worst", "BN health", "Drift, worst layer", "std", "fast against slow average of the batches"),
    ModelKey("bn/alarms", "BN health", "Alarms so far", "alarms", "raised against each layer's own spread"),
    ModelKey("bn/dead_fraction", "BN health", "Dead channels", "fraction", "channels that carry nothing on"),
    ModelKey("bn/nonfinite_layers", "BN health", "Layers with NaN or Inf", "layers", "in their batch statistics"),
    ModelKey("bn/unknown_layers", "BN health", "Layers that are not known", "layers", "neither read nor reduced"),
    ModelKey("bn/weight_median", "Why", "|γ|, median layer", "rms", "magnitude of the layers' weights"),  # noqa: RUF001
    ModelKey("bn/bias_median", "Why", "|β|, median layer", "rms", "magnitude of the layers' biases"),
    ModelKey("bn/batch_noise", "Why", "Batch noise, median layer", "std", "scatter of a batch's mean about its drift"),
    ModelKey("bn/normalization_batch_size", "Why", "Batch for 10 % noise", "samples", "that one batch would need"),
    ModelKey("bn/gap_loss", "Why", "Train-eval gap: loss", "loss", "loss by running minus loss by batch statistics"),
    ModelKey("bn/gap_disagreement", "Why", "Train-eval gap: predictions", "fraction", "that differ between the two"),
    ModelKey("bn/gap_output", "Why", "Train-eval gap: output", "relative rms", "difference of the outputs"),
    ModelKey("bn/dropout_shift_worst", "Why", "Dropout variance shift, worst layer", "|log ratio|", "with and without"),
    ModelKey(
        "bn/recalibration_shift_median", "Why", "Estimation shift, median layer", _STD, "running against population"
    ),
    ModelKey(
        "bn/recalibration_shift_worst", "Why", "Estimation shift, worst layer", _STD, "running against population"
    ),
    ModelKey("bn/ics_norm", "Why", "Internal covariate shift, median layer", "gradient norm", "‖G - G'‖"),
    ModelKey("bn/ics_cosine", "Why", "Internal covariate shift, median layer", "cosine", "cos(G, G')"),
    ModelKey(
        "bn/monitor_overhead", "Cost", "Monitor's share of the step", "fraction of CPU time", "since the last log"
    ),
    ModelKey("bn/probe_seconds", "Cost", "Probes", "s", "the train-eval gap and internal covariate shift, each time"),
    ModelKey("bn/recalibration_samples", "Cost", "Recalibration", "samples", "seen each time"),
    ModelKey("bn/recalibration_seconds", "Cost", "Recalibration", "s", "each time"),
)

LAYER_KEYS = (
    LayerKey("bn_shift", "Mean shift", _STD, "rms over channels of batch mean against running mean"),
    LayerKey("bn_variance", "Variance shift", "log ratio", "mean over channels, batch against running variance"),
    LayerKey("bn_kl", "KL divergence", "nats", "mean over channels, batch against running statistics"),
    LayerKey("bn_drift", "Drift", "std", "rms over channels, fast against slow average of the batches"),
    LayerKey("bn_noise", "Batch noise", "std", "rms over channels, scatter of a batch's mean about its drift"),
    LayerKey("bn_estimation", "Estimation shift", _STD, "running against population mean, at each recalibration"),
    LayerKey("bn_dropout", "Dropout variance shift", "log ratio", "variance with dropout over that without"),
    LayerKey("bn_ics", "Internal covariate shift", "gradient norm", "‖G - G'‖, see Santurkar et al. 2018"),
    LayerKey("bn_ics_cosine", "Internal covariate shift", "cosine", "cos(G, G'), see Santurkar et al. 2018"),
)


def short_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer name -> its name in a key, all different: letters and digits that every logger takes, no dots, no slashes.

    Examples:
        >>> short_names(["layer1.0.bn1", "layer1_0.bn1", ""])
        {'layer1.0.bn1': 'layer1_0_bn1', 'layer1_0.bn1': 'layer1_0_bn1_2', '': 'model'}
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for layer in layers:
        plain = "".join(
            letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in layer
        )
        plain = plain or "model"
        short, number = plain, 1
        while short in taken:
            number += 1
            short = f"{plain}_{number}"
        taken.add(short)
        names[layer] = short
    return names


def per_layer(
    prefix: str, values: Mapping[str, float], names: Mapping[str, str], *, limit: int = 100, worst: int = 20
) -> dict[str, float]:
    """The scalars of one measure: of all layers, or of the worst where there are more than ``limit``.

    Args:
        prefix: of a [`bnkit.dashboard.keys.LayerKey`][].
        values: by layer name; what is not finite is not known, and left out.
        names: of [`bnkit.dashboard.keys.short_names`][], for all layers of the model.
        limit: up to as many layers, all of them are logged.
        worst: how many there are beyond, those with the largest magnitude.
    """
    known = {layer: value for layer, value in values.items() if math.isfinite(value)}
    if len(names) > limit:
        largest = sorted(known, key=lambda layer: -abs(known[layer]))[:worst]
        known = {layer: known[layer] for layer in largest}
    return {f"{prefix}/{names[layer]}": value for layer, value in known.items()}
