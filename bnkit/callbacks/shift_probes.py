"""The probes that cost passes of their own: when they run in a fit, and what is logged of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bnkit import ranks
from bnkit.callbacks.own_forward import own_forward
from bnkit.dashboard.keys import per_layer
from bnkit.dashboard.scalars import dropout_scalars
from bnkit.feeding import Forward
from bnkit.layers import batch_norm_layers
from bnkit.monitoring import Monitor
from bnkit.norms import Variant
from bnkit.probes import (
    CovariateShift,
    GapReport,
    Loss,
    default_loss,
    evenly,
    internal_covariate_shift,
    train_eval_gap,
)

__all__ = ["ShiftProbes", "is_compiled"]

_LAYERS = 8
"""The internal covariate shift is measured of at most so many layers: each costs a backward pass."""


class ShiftProbes:
    """Runs the train-eval gap before a training step, and the internal covariate shift around one.

    A probe that cannot run on the batches of this module says so once, and is left out from then on: training goes on.

    Args:
        gap_every_n_steps: batches from one gap to the next; 0: never.
        covariate_shift_every_n_steps: optimizer steps from one covariate shift to the next; 0: never.
        forward, loss: see [`bnkit.probes.train_eval_gap`][].
    """

    def __init__(
        self, gap_every_n_steps: int, covariate_shift_every_n_steps: int, forward: Forward | None, loss: Loss | None
    ) -> None:
        for name, value in (
            ("gap_every_n_steps", gap_every_n_steps),
            ("covariate_shift_every_n_steps", covariate_shift_every_n_steps),
        ):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 (never) or more, but is {value!r}.")
        self._gap_every, self._covariate_every = gap_every_n_steps, covariate_shift_every_n_steps
        self._forward, self._loss = forward, loss
        self.stop()

    def start(self, *, every_rank: bool) -> None:
        """Begin a fit.

        Args:
            every_rank: run on every rank, and not on rank 0 alone.
        """
        self.stop()
        self._every_rank = every_rank
        self._gap_works, self._covariate_works = self._gap_every > 0, self._covariate_every > 0

    def stop(self) -> None:
        """Run no more, and forget."""
        self._every_rank = self._gap_works = self._covariate_works = False
        self._next_covariate_step = self._step = 0
        self._weights: dict[str, Tensor] = {}
        self._batch: Any = None
        self._dropout: Mapping[str, float] = {}

    def before(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, monitor: Monitor | None
    ) -> dict[str, float]:
        """Before a training batch: measure the gap, and remember the weights, where they are due."""
        covariate = self._covariate_works and trainer.global_step >= self._next_covariate_step
        gap = self._gap_works and (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self._gap_every == 0
        if not (covariate or gap) or not self._runs_here(trainer, pl_module):
            return {}
        if covariate:
            self._step = trainer.global_step
            self._weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self._batch = batch
        return self._gap(trainer, pl_module, batch, monitor) if gap else {}

    def after(
        self, trainer: Trainer, pl_module: LightningModule, monitor: Monitor | None, names: Mapping[str, str]
    ) -> dict[str, float]:
        """After a training batch: the shift by dropout, and by the optimizer's step, where they are due."""
        scalars = {} if self._batch is None else self._covariate_shift(trainer, pl_module, names)
        if monitor is not None and monitor.dropout_shift is not self._dropout:  # there is a new one
            self._dropout = monitor.dropout_shift
            scalars |= dropout_scalars(self._dropout, names)
        return scalars

    def _covariate_shift(
        self, trainer: Trainer, pl_module: LightningModule, names: Mapping[str, str]
    ) -> dict[str, float]:
        began = time.perf_counter()
        weights, batch, self._weights, self._batch = self._weights, self._batch, {}, None
        after = {name: p.detach() for name, p in pl_module.named_parameters()}
        if all(torch.equal(after[name], value) for name, value in weights.items()):
            return {}  # gradients are accumulated: there was no step
        self._next_covariate_step = self._step + self._covariate_every
        forward, loss = own_forward(trainer, self._forward), self._loss or default_loss

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            value = loss(forward(model, batch), batch)
            if value is None:
                raise TypeError("no loss is known for this output and batch")
            return value

        shifts: dict[str, CovariateShift] = {}
        with self._left_out_if_it_fails(pl_module, "_covariate_works", "internal covariate shift"):
            shifts = internal_covariate_shift(
                pl_module,
                batch,
                before=weights,
                after=after,
                loss=loss_of,
                layers=evenly(list(batch_norm_layers(pl_module)), _LAYERS),
            )
        if not shifts:
            return {}
        norms, cosines = ({name: getattr(s, field) for name, s in shifts.items()} for field in ("norm", "cosine"))
        return {
            "bn/ics_norm": _median(norms),
            "bn/ics_cosine": _median(cosines),
            "bn/probe_seconds": time.perf_counter() - began,
            **per_layer("bn_ics", norms, names),
            **per_layer("bn_ics_cosine", cosines, names),
        }

    def _gap(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, monitor: Monitor | None
    ) -> dict[str, float]:
        began = time.perf_counter()
        found: list[GapReport] = []
        with self._left_out_if_it_fails(pl_module, "_gap_works", "train-eval gap"):
            found.append(train_eval_gap(pl_module, batch, forward=own_forward(trainer, self._forward), loss=self._loss))
        if not found:
            return {}
        [gap] = found
        if monitor is not None:
            monitor.compare_with(gap.seen)
        scalars = {"bn/gap_loss": gap.loss, "bn/gap_disagreement": gap.disagreement, "bn/gap_output": gap.output}
        known = {key: value for key, value in scalars.items() if value is not None}
        return known | {"bn/probe_seconds": time.perf_counter() - began}

    @contextmanager
    def _left_out_if_it_fails(self, pl_module: LightningModule, flag: str, name: str) -> Iterator[None]:
        """A probe may meet anything in a user's model, and is never worth a training."""
        works = True
        try:
            yield
        except Exception as error:
            works = False
            rank_zero_warn(
                f"The {name} is not measured from now on, since its probe failed ({type(error).__name__}: {error}): "
                "say how to run the module and what the loss is by forward= and loss=, or leave the probe out."
            )
        if _waits_for_ranks(pl_module):  # one rank must not go on by itself to where it waits for the others
            works = all(other for (other,) in ranks.all_gather_numbers([works]))
        setattr(self, flag, works)

    def _runs_here(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether on this rank: rank 0, and all where a forward waits for the others, as after a scheduled swap."""
        return trainer.is_global_zero or self._every_rank or _waits_for_ranks(pl_module)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or a part of it, runs compiled: hooks do not fire there."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def _waits_for_ranks(module: nn.Module) -> bool:
    return ranks.world_size() > 1 and any(
        isinstance(layer, nn.SyncBatchNorm) or (isinstance(layer, Variant) and layer.waits_for_ranks)
        for layer in batch_norm_layers(module).values()
    )


def _median(values: Mapping[str, float]) -> float:
    return median(values.values()) if values else float("nan")
