"""BatchNorm's variants: other answers to "whose statistics normalise this sample?", under BatchNorm's own keys.

Two axes
--------
*Scope*: over which samples statistics are pooled. *Estimator*: what normalises.

| Variant           | Scope                      | Estimator                                       |
| ----------------- | -------------------------- | ----------------------------------------------- |
| `Ghost`           | part of the device's batch | exact mean and variance of the scope            |
| (plain BatchNorm) | the device's batch         | the same                                        |
| `Sync`            | a group of ranks           | the same                                        |
| `Domain`          | one domain's batch         | the same; running statistics for each domain    |
| `NormBatch`       | chosen by a batch size     | the same: resolves to Ghost, plain or Sync      |
| `Renorm`          | the device's batch         | the batch's, corrected towards the running ones |
| `Frozen`          | all that was trained on    | the running statistics, which no longer change  |
| `MovingAverage`   | the last batches           | their mean second moment, forward and backward  |
| `Group`           | one sample                 | its own groups of channels                      |

Spec and layer
--------------
A *spec* (the names above) is a frozen dataclass of plain values. ``spec.apply(layer, context)`` makes a torch BatchNorm
layer the variant in place: ``layer.__class__`` becomes a subclass of the torch class, and one private attribute records
what was there before. Parameters, buffers, hooks, aliases and whatever else the layer holds are the same objects.
``undo(layer)`` reads the record and gives the class and the attributes back. Before anything changes, ``check`` refuses
what cannot be; ``resolve(context)`` tells which spec it will really be, None for plain BatchNorm.

[`bnkit.norms.Context`][] carries what a layer does not know: the device's batch, the number of ranks, and the
convolution before it for the specs whose ``needs_convolution`` is true. Those change that module's class in the same
way, and undoing the layer undoes it too.

State
-----
``state_dict`` has BatchNorm's keys and shapes, and loads to and from plain BatchNorm. [`bnkit.norms.Domain`][] alone
has more keys, and fills them from a plain checkpoint. What a variant must remember beside that to resume exactly is in
buffers outside the state_dict, for a callback to keep: ``layer.step`` of Renorm, ``layer.averages`` of MovingAverage.

All layers update their running statistics by BatchNorm's rule, ``(1 - momentum) * running + momentum * statistic``,
once a training forward, with the mean and unbiased variance of all samples of the scope (of all ghosts together);
MovingAverage with 0 and E[x²]. Frozen and Group do not update.
"""

from bnkit.norms.adapters import register_adapter
from bnkit.norms.base import Variant
from bnkit.norms.domain import Domain, domain, plain_state_dict
from bnkit.norms.frozen import Frozen
from bnkit.norms.ghost import Ghost
from bnkit.norms.group import Group
from bnkit.norms.moving_average import MovingAverage
from bnkit.norms.norm_batch import NormBatch
from bnkit.norms.renorm import Renorm
from bnkit.norms.spec import Context, Spec, original_class, spec_of, undo
from bnkit.norms.sync import Sync, pool_running_statistics

__all__ = [
    "Context",
    "Domain",
    "Frozen",
    "Ghost",
    "Group",
    "MovingAverage",
    "NormBatch",
    "Renorm",
    "Spec",
    "Sync",
    "Variant",
    "domain",
    "original_class",
    "plain_state_dict",
    "pool_running_statistics",
    "register_adapter",
    "spec_of",
    "undo",
]
