"""The internal covariate shift of Santurkar et al. 2018."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnkit.layers import batch_norm_layers, unwrap
from bnkit.moments import to_float64
from bnkit.observation import eager
from bnkit.preservation import preserved, random_states_preserved, undoing

__all__ = ["CovariateShift", "evenly", "internal_covariate_shift"]


class CovariateShift(NamedTuple):
    r"""How the gradient of a layer changes by the step of the layers before it.

    Attributes:
        norm: $\|G - G'\|_2$, >= 0; 0 where there is no shift.
        cosine: of the angle between G and G', -1 to 1; 1 where there is no shift, NaN where one of them is 0.
    """

    norm: float
    cosine: float


def internal_covariate_shift(
    model: nn.Module,
    batch: Any,
    *,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
    layers: Collection[str] | None = None,
) -> dict[str, CovariateShift]:
    r"""How much the step of the layers before it changes a layer's gradient, on the same batch.

    $$
    G_i = \nabla_{W_i} L(W_1, \dots, W_k), \qquad
    G'_i = \nabla_{W_i} L(W_1^{+}, \dots, W_{i-1}^{+}, W_i, \dots, W_k)
    $$

    with $W$ the weights before an optimizer's step and $W^{+}$ those after it.

    A layer here is what the parameters between two BatchNorm layers are, in order of registration, the second one's
    included, and has that one's name. Parameters behind the last BatchNorm are in no layer; one that is used in several
    places belongs to the first. Parameters that do not learn stay as they are.

    Modes are taken as they are. All passes start from the same buffers and random states, so dropout drops the same,
    and run without autocast. Compiled models run eagerly meanwhile. Layers that are synchronized over ranks wait for
    the other ranks, which must call this too; gradients are this rank's.

    The cost: a forward and a backward for each layer, and one more. To probe fewer, see [`bnkit.probes.evenly`][].

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        batch: handed to ``loss``.
        before: parameter name (of the unwrapped model) -> its value before the step, of every parameter that learns;
            a copy.
        after: the same, after the step.
        loss: function of (model, batch) to a scalar tensor with a gradient.
        layers: names of the BatchNorm layers to probe. Default: all.

    Returns:
        Layer name -> norm and cosine, in order of registration. The first layer has nothing before it: 0 and 1. A layer
        that has no parameters that learn, or whose parameters take no part in the loss, has no entry.

    Raises:
        ValueError: where ``layers`` names no BatchNorm layer, a parameter is missing in ``before`` or ``after`` or has
            another shape there, both hold the same memory, or the loss is no scalar with a gradient.

    Source: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?", 2018, definition 2.1.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> before = {name: value.detach().clone() for name, value in model.named_parameters()}
        >>> after = {name: value + 0.1 for name, value in before.items()}
        >>> x = torch.randn(8, 2)
        >>> internal_covariate_shift(model, x, before=before, after=after, loss=lambda m, x: m(x).square().mean())
        {'1': CovariateShift(norm=0.0, cosine=1.0)}
    """
    model = unwrap(model)
    known = list(batch_norm_layers(model))
    unknown = sorted(set(layers or ()) - set(known))
    if unknown:
        raise ValueError(f"layers names {unknown}, which are no BatchNorm layers of the model: it has {known}.")
    groups = _groups(model)
    probed = [name for name in groups if layers is None or name in layers]
    wanted = [parameter for name in probed for parameter in groups[name]]
    learning = {_plain(name): value for name, value in model.named_parameters() if value.requires_grad}
    old, new = _weights(learning, before, after)
    shifts: dict[str, CovariateShift] = {}
    if not wanted:
        return shifts
    with torch.inference_mode(False), torch.enable_grad(), eager(), _writing(list(learning.values())) as write:
        write([old[name] for name in learning])
        gradients = iter(_gradients(model, batch, loss, wanted))
        stepped: set[int] = set()
        for name, parameters in groups.items():
            if name in probed:
                first = [next(gradients) for _ in parameters]
                if any(gradient is not None for gradient in first):
                    second = first
                    if stepped:
                        write([(new if id(value) in stepped else old)[key] for key, value in learning.items()])
                        second = _gradients(model, batch, loss, parameters)
                    shifts[name] = _covariate_shift(parameters, first, second)
            stepped |= {id(parameter) for parameter in parameters}
    return shifts


def evenly(names: Sequence[str], at_most: int) -> list[str]:
    """At most this many of the names, evenly spaced, the last among them: to probe a deep model at a bounded cost.

    Args:
        names: such as those of the layers, in order.
        at_most: how many, >= 1.

    Raises:
        ValueError: where ``at_most`` is less than 1.

    Examples:
        >>> evenly("abcdef", 3)
        ['b', 'd', 'f']
    """
    if at_most < 1:
        raise ValueError(f"at_most is a number of names, at least 1, not {at_most!r}.")
    count = min(at_most, len(names))
    return [names[(place + 1) * len(names) // count - 1] for place in range(count)]


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """BatchNorm layer -> the parameters that learn since the BatchNorm layer before it, its own included."""
    groups: dict[str, list[nn.Parameter]] = {}
    current: list[nn.Parameter] = []
    seen: set[int] = set()
    names = {id(layer): name for name, layer in batch_norm_layers(model).items()}
    for module in model.modules():
        own = [value for value in module.parameters(recurse=False) if value.requires_grad and id(value) not in seen]
        current += own
        seen |= {id(value) for value in own}
        if id(module) in names:
            groups[names[id(module)]] = current
            current = []
    return groups


def _weights(
    learning: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both sets of weights, checked, on the parameters' devices and of their dtypes, and apart from their memory."""
    sets = []
    for what, given in (("before", before), ("after", after)):
        given = {_plain(name): value for name, value in given.items()}
        missing = [name for name in learning if name not in given]
        if missing:
            raise ValueError(
                f"{what} lacks the parameters {missing}: give all that learn, by the unwrapped model's names."
            )
        for name, parameter in learning.items():
            if given[name].shape != parameter.shape:
                raise ValueError(
                    f"{what} has {name!r} in the shape {tuple(given[name].shape)}, but the model's parameter is "
                    f"{tuple(parameter.shape)}: take both from this model."
                )
        sets.append({name: given[name].detach() for name in learning})
    if learning and all(sets[0][name].data_ptr() == sets[1][name].data_ptr() for name in learning):
        raise ValueError("before and after are the same memory: clone the parameters before the optimizer's step.")
    old, new = (
        # The model's own parameters are written to: what is them must be copied first.
        {
            name: (value.clone() if value.data_ptr() == learning[name].data_ptr() else value).to(learning[name])
            for name, value in values.items()
        }
        for values in sets
    )
    return old, new


@contextmanager
def _writing(parameters: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """A function that writes values into these parameters, whose own come back, bit for bit, when the block ends.

    In place, and not by torch.func.functional_call: whatever else holds a parameter (a tied layer, an RNN's flat list)
    sees it too. Through ``.data``, so that a graph of the caller's does not take its parameters for changed ones.
    """
    storages = [parameter.data for parameter in parameters]
    kept = [storage.clone() for storage in storages]

    def write(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(storages, list(values))

    with undoing(lambda: write(kept)):
        yield write


def _gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The loss's gradient by these parameters, None for one that takes no part; ``.grad`` is not touched."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in parameters}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(random_states_preserved(model))
        stack.enter_context(preserved(model))
        value = loss(model, batch)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise ValueError(
                "loss must give one number with a gradient, as a training step does, such as "
                f"cross_entropy(model(batch[0]), batch[1]), but gave {type(value).__name__} {value!r:.80}."
            )
        return list(torch.autograd.grad(value, list(parameters), allow_unused=True))


def _covariate_shift(
    parameters: Sequence[Tensor], first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> CovariateShift:
    g, g_after = (
        torch.cat(
            [
                to_float64(torch.zeros_like(parameter) if gradient is None else gradient).flatten().cpu()
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ]
        )
        for gradients in (first, second)
    )
    # From the chord between the unit vectors: exactly 1 where the gradients are equal, and exact near it.
    cosine = 1 - 0.5 * (g / g.norm() - g_after / g_after.norm()).square().sum().clamp_max(4)
    return CovariateShift(float((g - g_after).norm()), float(cosine))
