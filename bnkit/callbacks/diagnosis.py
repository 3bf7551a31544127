"""BatchNormDiagnosis: what is wrong with the module's BatchNorm, told before the first training step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader

from bnkit import ranks
from bnkit.callbacks.order import run_after_other_callbacks
from bnkit.callbacks.own_forward import nothing_logged, own_forward
from bnkit.callbacks.recalibration import BatchNormRecalibration
from bnkit.callbacks.strategies import refuse_sharding
from bnkit.callbacks.training_data import TrainingData
from bnkit.diagnosis import SEVERITIES, Finding, Severity, diagnose, table
from bnkit.diagnosis.examine import check_codes
from bnkit.diagnosis.sample import try_sample
from bnkit.feeding import Forward, known_samples_in
from bnkit.layers import batch_norm_layers
from bnkit.preservation import random_states_preserved
from bnkit.stand_ins import waits_for_ranks

__all__ = ["BatchNormDiagnosis"]


class BatchNormDiagnosis(Callback):
    """Diagnoses the module's BatchNorm layers at the start of fit, and prints what it finds, with cause and cure.

    It looks at the module as training begins: built, swapped, with its weights loaded, on its device and with its
    optimizers, and takes the batch size, the number of ranks and the accumulation from the trainer. A batch of the
    training data goes through the module three times without gradient. It is read from a loader of the callback's own,
    and training is bit-identical to training without the callback: weights, buffers, random states and the live loader
    are left alone. Where no batch can be read, or the module cannot be run on it, the rest is diagnosed, and the table
    says so.

    All ranks take part; what is printed, kept and decided by is what rank 0 found.

    Args:
        fail_on: raise, before the first step, where there is a finding of this severity or a worse one: "error",
            "warning" or "info"; None: go on.
        sample: whether to run the module on a batch of the training data.
        ignore: codes of rules to leave out, such as ``("BN401",)``; [`bnkit.diagnosis.CODES`][] lists them.
        forward: how to run the module on a batch; default: its ``forward`` on a tensor, the first item of a tuple or
            list, or a dict as keyword arguments.

    Attributes:
        findings: of the last fit, see [`bnkit.diagnose`][].

    Raises:
        ValueError: for another ``fail_on``, and a code that there is none of.
        MisconfigurationException: in fit, with a strategy that shards parameters (FSDP, DeepSpeed, model parallel), and
            where ``fail_on`` says so.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormDiagnosis(fail_on="error", ignore=["BN401"])], logger=False)
    """

    def __init__(
        self,
        *,
        fail_on: Severity | None = None,
        sample: bool = True,
        ignore: Sequence[str] = (),
        forward: Forward | None = None,
    ) -> None:
        if fail_on is not None and fail_on not in SEVERITIES:
            raise ValueError(f"fail_on is 'error', 'warning', 'info' or None, not {fail_on!r}.")
        self.fail_on = fail_on
        self.sample = sample
        self.ignore = tuple(sorted(check_codes(ignore)))
        self.findings: list[Finding] = []
        self._forward = forward

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and see to it that scheduled swaps are done when this callback looks."""
        if stage != "fit":
            return
        refuse_sharding(self, trainer)
        run_after_other_callbacks(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Diagnose, and say so."""
        with nothing_logged(pl_module):  # its forward is traced too
            found, unmeasured = self._diagnose(trainer, pl_module)
        # What ranks measure differs with their batches, and all of them have to go on, or none.
        self.findings, unmeasured = ranks.all_gather_object((found, unmeasured))[0]
        if trainer.is_global_zero:
            print(f"\n{self._text(pl_module, unmeasured)}\n")
        self._refuse()

    # ------------------------------------------------------------------ what

    def _diagnose(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Finding], str]:
        """The findings, and why nothing was measured; empty where it was, or was not to be."""
        data = _describe(trainer)
        options: dict[str, Any] = {
            "optimizer": trainer.optimizers,
            "batch_size": data.batch_size,
            "smallest_batch": data.smallest_batch,
            "world_size": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
            "recalibrates": any(isinstance(c, BatchNormRecalibration) for c in trainer.callbacks),  # type: ignore[attr-defined]
            "averages": [a for c in trainer.callbacks if isinstance(a := _average_of(c), AveragedModel)],  # type: ignore[attr-defined]
            "ignore": self.ignore,
        }
        unmeasured = ""
        with random_states_preserved(pl_module):
            if self.sample:
                batch, unmeasured = self._batch(trainer, pl_module)
                if not unmeasured:
                    if options["batch_size"] is None:
                        options["batch_size"] = known_samples_in(batch)
                    forward = own_forward(trainer, self._forward)
                    try:
                        return diagnose(pl_module, sample=batch, forward=forward, **options), ""
                    except Exception as error:  # a user's model may do anything, and no diagnosis is worth a training
                        unmeasured = _in_words(error)
            try:
                return diagnose(pl_module, **options), unmeasured
            except (TypeError, ValueError) as error:  # a scripted or a lazy layer
                return [], _in_words(error)

    def _batch(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, str]:
        """A training batch on every rank, which the module can be run on, or why there is none on some."""
        batches: list[Any] = []
        why = ""
        try:
            batches = list(islice(iter(TrainingData(trainer, pl_module)), 1))
            why = "" if batches else "the training data is empty"
        except MisconfigurationException:
            kinds = {type(leaf).__name__ for leaf in tree_leaves(trainer.train_dataloader) if leaf is not None}
            why = (
                f"a batch of the training data ({', '.join(sorted(kinds))}) cannot be read without disturbing training"
            )
        except Exception as error:
            why = f"a batch could not be read: {_in_words(error)}"
        try:
            # One rank must not fail by itself where the others wait for it.
            if batches and any(waits_for_ranks(layer) for layer in batch_norm_layers(pl_module).values()):
                try_sample(pl_module, batches[0], own_forward(trainer, self._forward))
        except Exception as error:
            why = _in_words(error)
        why = next((said for said in ranks.all_gather_object(why) if said), "")
        return (batches[0] if batches else None), why

    # ------------------------------------------------------------------ how it is told

    def _text(self, pl_module: LightningModule, unmeasured: str) -> str:
        try:
            number = f"{len(batch_norm_layers(pl_module))} BatchNorm layers"
        except (TypeError, ValueError):
            number = "BatchNorm layers that cannot be looked at"
        note = f"\nNot measured: {unmeasured.rstrip('.')}." if unmeasured else ""
        return f"Diagnosis of {type(pl_module).__name__}, {number}\n{table(self.findings)}{note}"

    def _refuse(self) -> None:
        if self.fail_on is None:
            return
        limit = SEVERITIES.index(self.fail_on)
        bad = [finding for finding in self.findings if SEVERITIES.index(finding.severity) <= limit]
        if bad:
            raise MisconfigurationException(
                f"BatchNormDiagnosis(fail_on={self.fail_on!r}) stops the fit before its first step: "
                + " ".join(f"{finding}" for finding in bad)
                + " To go on all the same, leave these codes out by ignore=, or set fail_on=None."
            )


class _Data(NamedTuple):
    """What the training loaders say of their batches."""

    batch_size: int | None
    smallest_batch: int | None


def _describe(trainer: Trainer) -> _Data:
    """Samples in this rank's batches, and in the last one of an epoch where that is smaller."""
    loaders = [leaf for leaf in tree_leaves(trainer.train_dataloader) if leaf is not None]
    loader = loaders[0] if len(loaders) == 1 else None
    if not isinstance(loader, DataLoader):
        return _Data(None, None)
    sampler, size, drop_last = loader.sampler, loader.batch_size, loader.drop_last
    if type(loader.batch_sampler) is BatchSampler:
        plain = loader.batch_sampler
        sampler, size, drop_last = plain.sampler, plain.batch_size, plain.drop_last
    if type(size) is not int:
        return _Data(None, None)
    try:
        rest = len(sampler) % size  # type: ignore[arg-type]
        whole = trainer.num_training_batches >= len(loader)
    except TypeError:  # an iterable data set, of a length that nobody knows
        return _Data(size, None)
    return _Data(size, rest if rest and whole and not drop_last and len(loader) > 1 else None)


def _average_of(callback: Callback) -> Any:
    """What Lightning's WeightAveraging callbacks keep."""
    return getattr(callback, "_average_model", None)


def _in_words(error: Exception) -> str:
    return f"{error}" or type(error).__name__
