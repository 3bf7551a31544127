"""The page's sections: which figures and tables a run has, how to read them, and what is missing."""

from __future__ import annotations

import re

from bnkit.dashboard.history import TABLES, RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS
from bnkit.dashboard.page import figures
from bnkit.dashboard.page.drawings import (
    channels_by_layer,
    extremes,
    heatmap_of,
    line_drawing,
    peak_words,
    plain,
    small_drawings,
    zeros,
)
from bnkit.dashboard.page.grid import MAX_COLUMNS, largest
from bnkit.dashboard.page.verdict import alarms
from bnkit.dashboard.page.views import Drawing, Section, Variant, table_view
from bnkit.dashboard.page.wording import count

__all__ = ["sections"]

_MODEL = {key.key: key for key in MODEL_KEYS}
_PROBES = {
    "bn/gap_loss": "The train-eval gap was not measured: ActivationShiftMonitor(gap_every_n_steps=…) measures it.",
    "bn/ics_norm": "Internal covariate shift was not measured: ActivationShiftMonitor(covariate_shift_every_n_steps=…) "
    "measures it.",
    "bn/dropout_shift_worst": "No dropout variance shift is in this log: no dropout stands before a layer, or none was "
    "measured.",
}
"""Key -> what to say where it is not there."""

_ESTIMATION = ("bn/recalibration_shift_median", "bn/recalibration_shift_worst")
_MANY_PLOTS = 12  # of metrics that are not bnkit's


def sections(history: RunHistory) -> list[Section]:
    """The sections below the verdict, in their order; none is left out for want of numbers, but says what it lacks."""
    return [
        _alarms(history),
        _where(history),
        _why(history),
        _estimation(history),
        _swaps(history),
        _training(history),
        _cost(history),
        _layers(history),
    ]


def _alarms(history: RunHistory) -> Section:
    section = Section(
        "alarms", "Alarms", "Each was raised against the layer's own spread, and says its cause and its cure."
    )
    raised = alarms(history)
    if history.tables["alarms"].rows:
        columns = ("step", "message", "layer", "code", "score")
        section.tables.append(table_view(history, "alarms", "Alarms by step", columns, first="step"))
    elif raised == 0:
        section.missing.append("No alarm was raised.")
    elif raised is None:
        section.missing.append("No monitor's alarms are in this log: add ActivationShiftMonitor to the callbacks.")
    else:
        section.missing.append("What the alarms said is not in this log; a run directory with bn_history.json has it.")
    return section


def _where(history: RunHistory) -> Section:
    section = Section(
        "where",
        "Where it shifts",
        "How far each batch's statistics are from the running statistics that inference will use.",
    )
    variants = [variant for key in LAYER_KEYS if (variant := heatmap_of(history, key.prefix, key.title, key.meaning))]
    if variants:
        section.drawings.append(
            Drawing(
                "heatmap",
                "Every layer at every step",
                "Read across to see when a layer moved, down to see how far it spread: the brighter, the further "
                "(log ratios and cosines: red is above zero, blue below).",
                variants,
                chooser="Measure",
            )
        )
    else:
        section.missing.append("No measure of any layer is in this log: add ActivationShiftMonitor to the callbacks.")
    worst = figures.worst_layers(history)
    if worst.data:
        layers = history.layers("bn_shift")
        names = largest(layers, 8)
        long = any(len(layers[name]) > MAX_COLUMNS for name in names)
        section.drawings.append(
            Drawing(
                "worst",
                "The layers that shifted most",
                "A line that rises above the dashed median is a layer of its own trouble; all lines together are the "
                "training's. Triangles are alarms.",
                [
                    Variant(
                        "",
                        plain(worst),
                        f"Mean shift over the steps of {count(len(names), 'layer')}; the largest, "
                        f"{peak_words(layers)}.",
                        *extremes({name: layers[name] for name in names}, "layer"),
                        note=f"Of more than {MAX_COLUMNS} points, the largest are drawn." if long else "",
                    )
                ],
            )
        )
    section.drawings += small_drawings(history, "BN health")
    section.missing += zeros(history, "BN health")
    return section


def _why(history: RunHistory) -> Section:
    section = Section(
        "why",
        "Why",
        "Small batches, a gap between training and evaluation, dropout or the layers below: each leaves its own trace.",
    )
    noise = figures.noise(history)
    if noise.data:
        rows = history.tables["layers"].records()
        section.drawings.append(
            Drawing(
                "noise",
                "Batch noise",
                "Left, how much a batch's mean scatters by chance alone: right of the dashed line (10 %) the batch is "
                "small for this layer. Right, the batch that would bring it to 10 %.",
                [
                    Variant(
                        "",
                        plain(noise),
                        f"Batch noise of {count(len(rows), 'layer')} and the batch size that would bring it to 10 %.",
                        ["layer", "batch noise (std)", "batch for 10 % noise"],
                        [[row["layer"], row["batch_noise"], row["normalization_batch_size"]] for row in rows],
                    )
                ],
            )
        )
    else:
        section.missing.append("The noise of the single layers is not in this log.")
    section.missing += zeros(history, "Why")
    section.drawings += small_drawings(history, "Why", [key for key in _MODEL if key not in _ESTIMATION])
    for key, what in _PROBES.items():
        if not history.metrics.get(key):
            section.missing.append(what)
    return section


def _estimation(history: RunHistory) -> Section:
    section = Section(
        "recalibration",
        "Running against population",
        "What the layers remembered against what the data says: before each recalibration, and channel by channel.",
    )
    figure = figures.recalibration(history)
    if figure.data:
        records = history.tables["recalibrations"].records()
        last = max(int(row["step"] or 0) for row in records)
        rows = [row for row in records if row["step"] == last]
        section.drawings.append(
            Drawing(
                "recalibration-layers",
                f"Before and after the recalibration at step {last:,}",
                "Dots: how far the running mean was off before. Diamonds: what is left after it, the standard error of "
                "the new mean. A dot left of its diamond was within the error.",
                [
                    Variant(
                        "",
                        plain(figure),
                        f"How far the running means of {count(len(rows), 'layer')} were off before, and the standard "
                        "error after.",
                        [
                            "layer",
                            "before: mean shift (running std)",
                            "before: log variance ratio",
                            "after: standard error",
                        ],
                        [
                            [row["layer"], row["mean_shift"], row["log_variance_ratio"], row["standard_error"]]
                            for row in rows
                        ],
                    )
                ],
            )
        )
    else:
        section.missing.append(
            "Nothing was recalibrated, so how far the running statistics are from the population is unknown: add "
            "BatchNormRecalibration to the callbacks."
        )
    variants = channels_by_layer(history)
    if variants:
        section.drawings.append(
            Drawing(
                "channels",
                "One layer, channel by channel",
                "A dot on the dashed line is a channel that remembered well; the further off the line, the more wrong "
                "its output was at inference. The layer that was off most stands first.",
                variants,
                chooser="Layer",
            )
        )
    elif figure.data:
        section.missing.append("The single channels are not in this log.")
    section.drawings += small_drawings(history, "Why", _ESTIMATION)
    return section


def _swaps(history: RunHistory) -> Section:
    section = Section(
        "swaps", "Swapped layers", "Which layers normalize otherwise than the model was written, and since when."
    )
    if history.tables["swaps"].rows:
        section.tables.append(table_view(history, "swaps", "Layers that were swapped"))
    else:
        section.missing.append("No layer was swapped, as far as this log says; BatchNormSwap swaps them.")
    return section


def _training(history: RunHistory) -> Section:
    section = Section("training", "The training itself", "What the model learned meanwhile: the same steps as above.")
    groups: dict[str, dict[str, str]] = {}
    for key, series in history.metrics.items():
        if (
            series
            and not key.startswith(("bn/", "_"))
            and key.split("/")[0] not in {layer.prefix for layer in LAYER_KEYS}
        ):
            groups.setdefault(re.split(r"[_\-/]", key.split("/")[-1])[0], {})[key] = key
    groups.pop("epoch", None)
    for name, together in list(groups.items())[:_MANY_PLOTS]:
        section.drawings.append(line_drawing(history, "metric-" + str(len(section.drawings)), name, together))
    if len(groups) > _MANY_PLOTS:
        section.missing.append(f"Not drawn: {', '.join(list(groups)[_MANY_PLOTS:])}.")
    if not groups:
        section.missing.append("No loss and no accuracy is in this log.")
    return section


def _cost(history: RunHistory) -> Section:
    section = Section("cost", "What it cost", "The time that watching and recalibrating took from the training.")
    section.drawings += small_drawings(history, "Cost")
    section.missing += zeros(history, "Cost")
    if not section.drawings and not section.missing:
        section.missing.append("No cost is in this log.")
    return section


def _layers(history: RunHistory) -> Section:
    section = Section(
        "layers", "All layers", "What was known of each layer at the end; the buttons in the head of the table sort it."
    )
    if history.tables["layers"].rows:
        section.tables.append(
            table_view(history, "layers", "The last state of every layer", _layer_columns(), filterable=True)
        )
    else:
        section.missing.append(
            "The table of the layers is not in this log; a run directory with bn_history.json has it."
        )
    return section


def _layer_columns() -> list[str]:
    """What is looked at first stands first."""
    first = ("layer", "alarms", "mean_shift", "estimation_shift", "batch_noise", "normalization_batch_size", "drift")
    last = ("kind", "channels", "source")
    return [*first, *(column for column in TABLES["layers"] if column not in first + last), *last]
