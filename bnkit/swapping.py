"""swap: how a model's BatchNorm layers normalise, changed in place; revert: changed back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnkit import ranks
from bnkit.conversion import Conversion, LayerConversion
from bnkit.layers import batch_norm_layers
from bnkit.norms import Context, Frozen, NormBatch, Spec, original_class, spec_of, undo
from bnkit.norms.spec import RECORD, check_class
from bnkit.preceding import find_convolutions
from bnkit.rules import Match, Rules, match, unused

__all__ = ["OnUnknown", "check_on_unknown", "revert", "swap", "swap_layers", "why_unknown"]

OnUnknown = Literal["error", "skip"]


def swap(
    model: nn.Module,
    rules: Rules,
    *,
    on_unknown: OnUnknown = "error",
    dry_run: bool = False,
    device_batch: int | None = None,
    world_size: int | None = None,
    convolutions: Mapping[str, str] | None = None,
) -> Conversion:
    """Change how the BatchNorm layers of a model normalise, in place.

    A layer's class changes and nothing else does: parameters, buffers, hooks, aliases, modes, ``momentum`` and ``eps``
    are the same objects and values as before, so an optimizer, a compiled model and checkpoints go on working. A layer
    that is a variant already is swapped from its original class; one that has the spec already stays as it is, with
    what it remembers. A layer that is used in several places is one layer.

    All or nothing: every layer is checked before the first one changes, and if a swap fails after all, the model is
    as it was.

    Args:
        model: the model; also wrapped in DistributedDataParallel or compiled.
        rules: one spec of ``bnkit.norms`` for all layers, or a dict from pattern to spec. A pattern is that of
            ``fnmatch``, case-sensitive, on the layer's qualified name (``"layer4.*"``); the first that matches
            wins. None, or no pattern that matches, leaves a layer as it is.
        on_unknown: what to do with a layer that a rule is for but whose class is not torch's own and has no
            [`bnkit.register_adapter`][]. "error": refuse, naming all of them; "skip": leave it alone, and say so in the
            table.
        dry_run: check everything and change nothing. (For ``Sync`` over sub-groups the groups are made, so every rank
            must take part.)
        device_batch: samples in one device's training batch, which ``NormBatch`` resolves by.
        world_size: ranks that train together; None: those of the initialized process group, or 1.
        convolutions: names of convolutions by layer name, for the specs that need the convolution before a layer
            (``MovingAverage``, ``Group(weight_standardization=True)``). Those not given are found by tracing the model
            with ``torch.fx``.

    Returns:
        The conversion, with ``.table()`` and ``.revert()``.

    Raises:
        TypeError: for rules that are none; for layers of unknown classes; for a scripted model.
        ValueError: where a spec refuses a layer, or is not to be had with this batch and these ranks; where the
            convolution before a layer cannot be known.

    Warns:
        UserWarning: for each pattern that no layer falls under.

    Examples:
        >>> import torch, bnkit
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = bnkit.swap(model, {"1": bnkit.norms.Ghost(16)})
        >>> print(conversion.table())
        layer  from         to                                  rule
        ---------------------------------------------------------------------------------------------
        1      BatchNorm2d  Ghost(size=16, grouping='strided')  1: Ghost(size=16, grouping='strided')
        1 of 1 layers were swapped
        >>> bnkit.revert(model)
        ['1']
    """
    names = batch_norm_layers(model)
    found = match(rules, names)
    for problem in unused(rules, names):
        warnings.warn(problem, UserWarning, stacklevel=2)
    return swap_layers(
        model,
        found,
        on_unknown=on_unknown,
        dry_run=dry_run,
        device_batch=device_batch,
        world_size=world_size,
        convolutions=convolutions,
    )


def swap_layers(
    model: nn.Module,
    matches: Mapping[str, Match],
    *,
    on_unknown: OnUnknown = "error",
    dry_run: bool = False,
    device_batch: int | None = None,
    world_size: int | None = None,
    convolutions: Mapping[str, str] | None = None,
) -> Conversion:
    """As [`bnkit.swap`][], by the rule of each layer instead of patterns."""
    check_on_unknown(on_unknown)
    layers = batch_norm_layers(model)
    for name in convolutions or {}:
        if name not in layers:
            raise ValueError(f"convolutions: the model has no BatchNorm layer {name!r}.")
    asked = {name: rule.spec for name, rule in matches.items() if rule.spec is not None}
    unknown = {name: why for name in asked if (why := why_unknown(layers[name]))}
    if unknown and on_unknown == "error":
        names = {why: [name for name in unknown if unknown[name] == why] for why in unknown.values()}
        raise TypeError("\n".join(f"{', '.join(those)}: {why}" for why, those in names.items()))
    asked = {name: spec for name, spec in asked.items() if name not in unknown}
    context = Context(device_batch, ranks.world_size() if world_size is None else world_size)
    contexts, resolved = _check(model, layers, asked, context, convolutions)

    made: dict[str, LayerConversion] = {}
    for name, layer in layers.items():
        rule, before = matches.get(name), spec_of(layer)
        made[name] = LayerConversion(
            layer_class=original_class(layer).__name__,
            before=before,
            after=resolved.get(name, before),
            pattern=None if rule is None else rule.pattern,
            rule=None if rule is None or name in unknown else rule.spec,
            note="(skipped: its class is not known)" if name in unknown else "",
        )
    if not dry_run:
        todo = [name for name in resolved if made[name].changed]
        with _restored_on_failure([layers[name] for name in todo], [contexts[name].convolution for name in todo]):
            for name in todo:
                spec = resolved[name]
                if spec is None:
                    undo(layers[name])
                else:
                    spec.apply(layers[name], contexts[name])
    knobs = dict.fromkeys(spec for spec in asked.values() if isinstance(spec, NormBatch))
    return Conversion(made, tuple(knob.explain(context) for knob in knobs), dry_run, layers)


def revert(model: nn.Module) -> list[str]:
    """Give every swapped layer of a model its original class back, in place.

    The result has no trace of bnkit: for a variant with BatchNorm's inference it gives the same outputs in evaluation,
    bit for bit, and can be exported, fused, quantized and pickled as the model's author wrote it. Parameters,
    buffers, hooks and aliases are kept. What a variant remembered beside BatchNorm's buffers (the other domains'
    statistics, a schedule's position) is gone.

    Returns:
        The names of the layers that were given back; none for a model that was not swapped.

    Raises:
        TypeError: for a layer that was parametrized after it was swapped; nothing has changed then.
    """
    layers = batch_norm_layers(model)
    for name, layer in layers.items():
        if spec_of(layer) is not None and is_parametrized(layer):
            raise TypeError(f"{name} was parametrized after it was swapped: remove its parametrizations first.")
    return [name for name, layer in layers.items() if undo(layer)]


def check_on_unknown(on_unknown: str) -> None:
    """Raise ValueError for another value than those of [`bnkit.swap`][]."""
    if on_unknown not in ("error", "skip"):
        raise ValueError(f"on_unknown is 'error' or 'skip', not {on_unknown!r}.")


def why_unknown(layer: _BatchNorm) -> str:
    """Why a layer cannot be swapped, whatever the spec; empty where it can."""
    try:
        check_class(layer)
    except TypeError as error:
        return str(error)
    return ""


def _check(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    asked: Mapping[str, Spec],
    context: Context,
    convolutions: Mapping[str, str] | None,
) -> tuple[dict[str, Context], dict[str, Spec | None]]:
    """Each layer's context and the spec that it will really have, or the first refusal, by the layer's name."""
    needing = [name for name, spec in asked.items() if spec.needs_convolution]
    found = find_convolutions(model, needing, convolutions)
    contexts: dict[str, Context] = {}
    resolved: dict[str, Spec | None] = {}
    for name, asked_spec in asked.items():
        contexts[name] = Context(context.device_batch, context.world_size, found.get(name))
        try:
            spec = resolved[name] = asked_spec.resolve(contexts[name])
            if spec is not None:
                spec.check(layers[name], contexts[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    _check_sharing(model, layers, found, resolved)
    return contexts, resolved


def _check_sharing(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    convolutions: Mapping[str, nn.Module],
    resolved: Mapping[str, Spec | None],
) -> None:
    """Refuse what a swap would change for others too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    users: dict[int, str] = {}
    for name, convolution in convolutions.items():
        other = users.setdefault(id(convolution), name)
        if other != name:
            raise ValueError(f"{name}: its convolution is also that of {other}; it can be swapped for one only.")
        if any(len(holders.get(id(parameter), ())) > 1 for parameter in convolution.parameters(recurse=False)):
            raise ValueError(f"{name}: the convolution before it shares a parameter with another module.")
    for name, spec in resolved.items():
        tied = any(len(holders[id(parameter)]) > 1 for parameter in layers[name].parameters(recurse=False))
        if isinstance(spec, Frozen) and not spec.affine and tied:
            raise ValueError(f"{name}: Frozen(affine=False) would freeze a parameter that another module has too.")


@contextmanager
def _restored_on_failure(layers: list[_BatchNorm], convolutions: list[nn.Module | None]) -> Iterator[None]:
    """If the block fails, also by Ctrl-C, put the modules back to the class, attributes and values that they had."""
    modules: dict[nn.Module, None] = dict.fromkeys([*layers, *(c for c in convolutions if c is not None)])
    for layer in layers:
        modules.update(dict.fromkeys(_tied_to(layer)))
    before = [(m, m.__class__, dict(m.__dict__), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    # Values, for leaving MovingAverage writes a convolution's weights.
    parameters = [(p, p.requires_grad, p.detach().clone()) for m in modules for p in m.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        for module, cls, attributes, buffers, volatile in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for kept, held in ((module._buffers, buffers), (module._non_persistent_buffers_set, volatile)):
                kept.clear()
                kept.update(held)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter, learns, value in parameters:
                parameter.requires_grad_(learns)
                if not parameter.is_meta and not torch.equal(parameter, value):
                    parameter.copy_(value)
        raise


def _tied_to(layer: _BatchNorm) -> list[Any]:
    """The convolution that the layer's present spec has changed too."""
    record = layer.__dict__.get(RECORD)
    convolution = None if record is None else record.kept.get("convolution")
    return [] if convolution is None else [convolution]
