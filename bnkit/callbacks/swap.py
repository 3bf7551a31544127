"""BatchNormSwap: train with another BatchNorm, from the start or from some epoch on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnkit.callbacks.module_hooks import ModuleHooks
from bnkit.callbacks.schedule import Key, RulesConfig, Schedule, warn
from bnkit.callbacks.swap_checks import check_freezing, check_trainer, loader_batch
from bnkit.callbacks.swap_state import describe_difference, layer_states, load_layer_states
from bnkit.conversion import Conversion
from bnkit.layers import batch_norm_layers
from bnkit.norms import Frozen, NormBatch, Spec, Sync, pool_running_statistics, spec_of, undo
from bnkit.rules import Match
from bnkit.swapping import OnUnknown, check_on_unknown, swap_layers, why_unknown

__all__ = ["BatchNormSwap"]

log = logging.getLogger(__name__)

_BUILDING = ("configure_model", "configure_sharded_model", "setup")
"""Hooks in which a module may build its layers, the last one that Lightning calls first."""


class BatchNormSwap(Callback):
    """Swaps the module's BatchNorm layers by [`bnkit.swap`][], at setup and, with a schedule, during training.

    The layers are swapped as soon as the module is built (in ``__init__``, ``setup`` or ``configure_model``), before a
    checkpoint is loaded, DistributedDataParallel wraps the module and the optimizers see its parameters. Scheduled
    rules apply at the start of their epoch; parameters and optimizers stay as they are. Checkpoints have BatchNorm's
    own keys, so they load with and without the callback; beside them the callback keeps its rules, what they
    resolved to, and what a layer remembers outside the state_dict (``Renorm``'s step, ``MovingAverage``'s windows).
    Resuming goes on with the rules due at that epoch, and warns where a checkpoint was trained with others.

    ``validate``, ``test`` and ``predict`` swap too, since some variants change inference: by the rules that a
    checkpoint was saved under, or else as the last fit left the module, or else by ``rules``. ``Sync`` and
    ``NormBatch`` have BatchNorm's inference and are not applied there.

    ``NormBatch`` resolves when training starts, by the ``batch_size`` of the training loader and the number of ranks,
    and anew when these change. Where ``Sync`` is over sub-groups of ranks, their running statistics are pooled before
    each validation, at the end of each epoch and before saving. (A weights-only checkpoint within an epoch has those of
    rank 0.)

    After a fit by ``ddp_spawn`` or ``ddp_fork`` the module in the main process has the trained weights and the classes
    from before: swap it by [`bnkit.swap`][] where its variant changes inference.

    Args:
        rules: a spec of ``bnkit.norms``, or a dict from pattern to spec or None, as for [`bnkit.swap`][]; None swaps
            nothing at setup. From a config file also a string (``"Ghost(16)"``) or a dict with ``_target_`` or
            ``class_path``.
        schedule: rules by when they begin: an int is an epoch, from 1; a float between 0 and 1 is that fraction of
            ``max_epochs``, rounded up to an epoch. They apply on top of those before; None makes the layers plain
            BatchNorm again.
        on_unknown: what to do with layers of unknown classes: "error" or "skip".
        device_batch: samples in one device's training batch, for ``NormBatch``; None: the training loader's.
        convolutions: see [`bnkit.swap`][].

    Attributes:
        conversion: the [`bnkit.Conversion`][] of the last swap; None before the first.

    Raises:
        ValueError, TypeError: an argument that is none of these; in setup, layers that cannot be swapped.
        MisconfigurationException: with ``Trainer(sync_batchnorm=True)``; with a strategy that shards parameters (FSDP,
            DeepSpeed, model parallel); where the device's batch is needed and cannot be known; and where a schedule
            needs more of DistributedDataParallel than it can.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from bnkit.norms import Frozen, Ghost
        >>> swap = BatchNormSwap(Ghost(16), schedule={0.8: Frozen()})
        >>> trainer = Trainer(callbacks=[swap], max_epochs=10, logger=False)
    """

    def __init__(
        self,
        rules: RulesConfig = None,
        schedule: Mapping[int | float | str, RulesConfig] | None = None,
        *,
        on_unknown: OnUnknown = "error",
        device_batch: int | None = None,
        convolutions: Mapping[str, str] | None = None,
    ) -> None:
        check_on_unknown(on_unknown)
        if device_batch is not None and (type(device_batch) is not int or device_batch < 1):
            raise ValueError(f"device_batch is a number of samples, at least 1, or None, not {device_batch!r}.")
        self.schedule = Schedule(rules, schedule)
        self.on_unknown: OnUnknown = on_unknown
        self.device_batch = device_batch
        self.convolutions = dict(convolutions or {})
        self.conversion: Conversion | None = None
        self._hooks = ModuleHooks()
        self._module: LightningModule | None = None
        self._stages: tuple[Key, ...] = ()  # the stages that the module has gone through, in order
        self._rules: dict[str, Match] = {}  # by layer, those that it has now
        self._batch: int | None = None
        self._evaluating = False
        self._known = False  # whether it is known which stage the module is in
        self._remembered: dict[str, dict[str, Any]] = {}  # by layer, at the end of the last epoch
        self._planned: dict[str, str] = {}  # by layer, what a checkpoint's rules resolved to

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and swap as soon as the module is built."""
        self._hooks.unwrap()
        if not self.schedule:
            self._hooks.wrap(pl_module, "on_load_checkpoint", before=self._warn_of_swapped)
            return
        self._evaluating = stage != TrainerFn.FITTING
        self._batch, self._planned = self.device_batch, {}
        if not self._evaluating:
            check_trainer(trainer, self.schedule.specs())
            self.schedule.resolve(trainer.max_epochs)
        if pl_module is not self._module:
            self._module, self._stages, self._rules, self._known = pl_module, (), {}, not self._evaluating
        self._hooks.wrap(pl_module, "on_load_checkpoint", before=lambda checkpoint: self._resume(trainer, checkpoint))
        built_in = [hook for hook in _BUILDING if is_overridden(hook, pl_module)]
        if built_in:
            self._hooks.wrap(pl_module, built_in[0], after=lambda: self._built(trainer))
        else:
            self._built(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is built and its weights are loaded."""
        self._hooks.unwrap(*self._averaged(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the rules due, also where training resumes within an epoch; plan by the loader, which is there now."""
        if not self.schedule:
            return
        if self._batch is None and any(isinstance(spec, NormBatch) for spec in self.schedule.specs()):
            self._batch = loader_batch(trainer)
            self._check_all(trainer)
        self._go_to(trainer, self.schedule.due(trainer.current_epoch))
        self._say_replanned(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the rules that begin at this epoch."""
        stages = self.schedule.due(trainer.current_epoch) if self.schedule else ()
        if stages != self._stages:
            self._go_to(trainer, stages)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pool the running statistics of sub-groups of ranks: DistributedDataParallel keeps rank 0's."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._pool(trainer)
        else:
            self._begin_evaluation()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is built and its weights are loaded."""
        self._begin_evaluation()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is built and its weights are loaded."""
        self._begin_evaluation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pool before checkpoints of the epoch's end, those of the weights alone too."""
        self._pool(trainer)
        self._remembered = layer_states(batch_norm_layers(pl_module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Pool in place: the checkpoint holds the buffers themselves. Lightning calls this on every rank."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._pool(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pool for the model that fit leaves behind."""
        self._pool(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weight averaging has copied its average over what the layers remember: give that back."""
        load_layer_states(batch_norm_layers(pl_module), self._remembered)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave none of the module's hooks wrapped, also where the loop was skipped."""
        self._hooks.unwrap(*self._averaged(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave none of the module's hooks wrapped."""
        self._hooks.unwrap(*self._averaged(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The rules, the stages gone through, each layer's rule and what it resolved to, and what layers remember."""
        if self._module is None or not self._stages:
            return {}
        layers = batch_norm_layers(self._module)
        rules = {name: rule for name, rule in self._rules.items() if not why_unknown(layers[name])}
        return {
            "rules": self.schedule.to_dict(),
            "stages": list(self._stages),
            "layers": {name: str(rule.spec) for name, rule in rules.items()},
            "plan": {name: str(spec_of(layers[name]) or "plain BatchNorm") for name in rules},
            "convolutions": dict(self.convolutions),
            "remembered": layer_states(layers),
        }

    # ------------------------------------------------------------------ when

    def _built(self, trainer: Trainer) -> None:
        if self._evaluating:
            self._go_to(trainer, self._stages or self.schedule.start)
            return
        if not self._stages:
            self.schedule.warn_of_unused(batch_norm_layers(self._the_module))
        self._check_all(trainer)
        self._go_to(trainer, self.schedule.due(trainer.current_epoch))

    def _resume(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Go to the stage that a checkpoint was saved in, just before its weights are loaded."""
        callbacks = checkpoint.get("callbacks")
        if callbacks is None:
            return  # the weights alone: nobody knows how they were trained
        state = callbacks.get(self.state_key)
        if state is None:
            warn(
                "The checkpoint was saved without BatchNormSwap, from a model whose BatchNorm layers may have been "
                f"plain; they are now swapped by {self.schedule.to_dict()}."
            )
            return
        if state["rules"] == self.schedule.to_dict():
            stages = tuple(state["stages"])
        else:
            stages = self.schedule.start if self._evaluating else self.schedule.due(checkpoint["epoch"])
        self._go_to(trainer, stages)
        self._known = True
        layers = batch_norm_layers(self._the_module)
        now = {name: str(rule.spec) for name, rule in self._rules.items() if not why_unknown(layers[name])}
        difference = describe_difference(state["layers"], now)
        if difference:
            warn(
                f"The checkpoint's BatchNorm layers differ from those of this BatchNormSwap, whose rules apply: "
                f"{difference}. To go on as it was trained, give it the rules {state['rules']}."
            )
        else:
            self._planned = state["plan"]
        load_layer_states(batch_norm_layers(self._the_module), state["remembered"])

    def _warn_of_swapped(self, checkpoint: dict[str, Any]) -> None:
        state = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if state and state.get("layers"):
            warn(
                "The checkpoint was trained with swapped BatchNorm layers, and this BatchNormSwap leaves them plain. "
                f"To go on as it was trained, give it the rules {state['rules']}."
            )

    def _begin_evaluation(self) -> None:
        self._hooks.unwrap()
        if self.schedule and not self._known and self.schedule.is_scheduled:
            warn(
                "No checkpoint says which of BatchNormSwap's scheduled rules this model was trained by last; it is "
                "evaluated by those of the start. Give ckpt_path= to evaluate it as it was saved."
            )

    # ------------------------------------------------------------------ what

    @property
    def _the_module(self) -> LightningModule:
        assert self._module is not None
        return self._module

    def _averaged(self, trainer: Trainer) -> Iterator[nn.Module]:
        """Copies of the module that hold averaged weights, whose buffers are matched with its own by their order."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, AveragedModel):
                yield average.module

    def _go_to(self, trainer: Trainer, stages: tuple[Key, ...]) -> None:
        rules = self.schedule.rules_after(stages, batch_norm_layers(self._the_module))
        for model in (*self._averaged(trainer), self._the_module):
            self.conversion = self._swap(trainer, model, rules)
            layers = batch_norm_layers(model)
            for name in self._rules.keys() - rules.keys():
                undo(layers[name])
        self._stages, self._rules = stages, rules
        self._say_changes(trainer)

    def _swap(
        self, trainer: Trainer, model: nn.Module, rules: dict[str, Match], *, dry_run: bool = False
    ) -> Conversion:
        return swap_layers(
            model,
            {name: rule for name, rule in rules.items() if not self._waits(rule.spec)},
            on_unknown=self.on_unknown,
            dry_run=dry_run,
            device_batch=self._batch,
            world_size=trainer.world_size,
            convolutions={name: found for name, found in self.convolutions.items() if name in rules},
        )

    def _waits(self, spec: Spec | None) -> bool:
        """Whether the spec is not for now: the batch is not known yet, or there is no training."""
        if self._evaluating:
            return isinstance(spec, NormBatch | Sync)
        return isinstance(spec, NormBatch) and self._batch is None

    def _check_all(self, trainer: Trainer) -> None:
        """Refuse now what could not be swapped at a later epoch; make process groups while all ranks are here."""
        names = batch_norm_layers(self._the_module)
        stages = self.schedule.due(None)
        frozen: set[str] = set()
        for count in range(1, len(stages) + 1):
            rules = self.schedule.rules_after(stages[:count], names)
            self._swap(trainer, self._the_module, rules, dry_run=True)
            held = {name for name, rule in rules.items() if isinstance(rule.spec, Frozen) and not rule.spec.affine}
            if count > 1 and held != frozen and trainer.world_size > 1:
                check_freezing(trainer, unfreezes=not held >= frozen)
            frozen = held

    def _pool(self, trainer: Trainer) -> None:
        for model in (*self._averaged(trainer), self._module):
            if model is not None and self._rules:
                pool_running_statistics(model)

    def _say_changes(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self.conversion is None:
            return
        made = Counter(
            (str(layer.before or layer.layer_class), str(layer.after or layer.layer_class))
            for layer in self.conversion.layers.values()
            if layer.changed
        )
        for (before, after), count in made.items():
            log.info("BatchNormSwap: %d layers from %s to %s", count, before, after)
        for plan in self.conversion.plans if made else ():
            log.info("BatchNormSwap: %s", plan)

    def _say_replanned(self, trainer: Trainer) -> None:
        now = self.state_dict().get("plan", {})
        difference = describe_difference(self._planned, now) if self._planned else ""
        self._planned = {}
        if difference and trainer.is_global_zero:
            log.info("BatchNormSwap: planned anew for %d ranks: %s", trainer.world_size, difference)
