"""Runs that never were, for the page and its figures."""

import math
import random

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import per_layer, short_names

NASTY = (
    "<script>alert(1)</script>",
    "quo\"ted.'layer'</script><!--",
    "näme.слой.层",
    "<b>bold</b>&amp;%{x}",
)


def layer_names(number):
    """Names as of a ResNet, with hostile ones among them."""
    names = [f"layer{1 + 4 * i // number}.{i % 50}.bn{1 + i % 3}" for i in range(number)]
    names = [name if names.index(name) == i else f"{name}.{i}" for i, name in enumerate(names)]
    for position, name in enumerate(NASTY):
        names[(position + 1) * number // (len(NASTY) + 2)] = name
    return names


def history(layers=20, points=60, every=20, channels=16, seed=0):
    """A run with everything: two layers go wrong, one is not known, one has NaN."""
    chance = random.Random(seed)
    names = layer_names(layers)
    shorts = short_names(names)
    run = RunHistory(
        names={short: name for name, short in shorts.items()},
        info={"model": "ResNet-20", "data": "Fashion-MNIST", "steps": str(points * every), "world size": "1"},
    )
    bad = {names[layers // 2]: 2 / 3, names[-2]: 1 / 3}  # layer -> when it goes wrong
    level = {name: math.exp(chance.gauss(-3, 0.6)) for name in names}
    for point in range(points):
        step = point * every
        shift = {}
        for name in names:
            after = point / points - bad.get(name, 2)
            shift[name] = level[name] * math.exp(chance.gauss(0, 0.15)) * (1 + 25 * max(0.0, after))
        run.log(per_layer("bn_shift", shift, shorts), step)
        run.log(per_layer("bn_kl", {name: value**2 / 2 for name, value in shift.items()}, shorts), step)
        run.log(per_layer("bn_variance", {name: chance.gauss(0, 0.1) for name in names}, shorts), step)
        ordered = sorted(shift.values())
        run.log(
            {
                "bn/shift_median": ordered[layers // 2],
                "bn/shift_worst": ordered[-1],
                "bn/drift_median": ordered[layers // 2] / 3,
                "bn/drift_worst": ordered[-1] / 3,
                "bn/alarms": float((point > points // 3) + (point > 2 * points // 3)),
                "bn/dead_fraction": 0.01,
                "bn/nonfinite_layers": 0.0,
                "bn/batch_noise": 0.12 + chance.gauss(0, 0.004),
                "bn/normalization_batch_size": 184.0,
                "bn/weight_median": 1 + 0.001 * point,
                "bn/bias_median": 0.002 * point,
                "bn/monitor_overhead": 0.004 + abs(chance.gauss(0, 0.0005)),
                "train/loss": math.exp(-point / 20) + abs(chance.gauss(0, 0.02)),
                "epoch": float(point // 10),
            },
            step,
        )
        if point % 10 == 9:
            run.log(
                {
                    "bn/gap_loss": 0.02 + 0.002 * point,
                    "bn/gap_disagreement": 0.01 + 0.0004 * point,
                    "bn/dropout_shift_worst": 0.03,
                    "bn/ics_norm": 0.4 + chance.gauss(0, 0.05),
                    "bn/ics_cosine": 0.6,
                    "bn/probe_seconds": 0.31,
                    "bn/recalibration_seconds": 0.82 + chance.gauss(0, 0.05),
                    "bn/recalibration_samples": 10000.0,
                    "val/loss": math.exp(-point / 22),
                    "val/accuracy": 0.92 - math.exp(-point / 12) / 2,
                    "val/accuracy_running_average": 0.9 - math.exp(-point / 12) / 2,
                },
                step,
            )
            for name in names[1:]:
                run.tables["recalibrations"].add(
                    step=step,
                    layer=name,
                    mean_shift=shift[name] * 2,
                    log_variance_ratio=chance.gauss(0, 0.05),
                    standard_error=0.008 + chance.random() * 0.01,
                    source="layer",
                )
            run.log(per_layer("bn_estimation", {name: shift[name] * 2 for name in names[1:]}, shorts), step)
    for position, name in enumerate(names):
        known = position != 0
        run.tables["layers"].add(
            layer=name,
            kind="BatchNorm2d" if position % 5 else "Ghost(32)",
            channels=channels,
            source="layer" if known else "unknown: its forward never ran",
            mean_shift=shift[name] if known else None,
            log_variance_ratio=chance.gauss(0, 0.1) if known else None,
            kl=shift[name] ** 2 / 2 if known else None,
            wasserstein2=shift[name] * 1.1 if known else None,
            psi=shift[name] ** 2 if known else None,
            drift=shift[name] / 3 if known else None,
            batch_noise=math.exp(chance.gauss(-2.2, 0.4)) if known else None,
            normalization_batch_size=round(math.exp(chance.gauss(5, 0.8))) if known else None,
            estimation_shift=shift[name] * 2 if known else None,
            dead_fraction=0.25 if position == 3 else 0.0,
            weight=1.0 + 0.001 * position,
            bias=0.1,
            finite=True if known else None,
            alarms=int(name in bad),
        )
        for channel in range(channels if known else 0):
            mean, var = chance.gauss(0, 1), math.exp(chance.gauss(0, 1))
            run.tables["channels"].add(
                layer=name,
                channel=channel,
                running_mean=mean,
                running_var=var,
                population_mean=mean + chance.gauss(0, 2 * shift[name]) * math.sqrt(var),
                population_var=var * math.exp(chance.gauss(0, 0.1)),
            )
    for name, when in bad.items():
        step = int(when * points + 1) * every
        run.tables["alarms"].add(
            step=step,
            layer=name,
            code="shift",
            score=3.21,
            message=f"{name} shifted 3.2 times beyond its own spread at step {step}: what comes before it changed. "
            "Look at the data and the learning rate at this step; recalibrate before you validate.",
        )
    for name in names[::5]:
        run.tables["swaps"].add(step=0, layer=name, before="BatchNorm2d(16)", after="Ghost(32)")
    return run


def metrics_only(points=30):
    """As read from a CSV: scalars, no tables, no names."""
    whole = history(points=points)
    return RunHistory(metrics=whole.metrics)
