"""Domains: the exact estimator over each domain's samples apart, with one affine map for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.base import Variant
from bnkit.norms.spec import Context, Spec

__all__ = ["Domain", "DomainBatchNorm1d", "DomainBatchNorm2d", "DomainBatchNorm3d", "domain", "plain_state_dict"]

ACTIVE = "_domain"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Domain(Variant):
    """Plain BatchNorm by the running statistics of the domain in use; see [`bnkit.norms.Domain`][].

    The statistics in use stand under BatchNorm's own names, so that all who read or write a BatchNorm layer's
    statistics (recalibration, a monitor) mean the domain in use; the others stand under theirs.
    """

    @property
    def domain(self) -> str:
        """The domain in use."""
        name: str = self.__dict__[ACTIVE]
        return name

    def _use(self, name: str) -> None:
        first = self.spec.names[0]
        for exchanged in {self.domain, name} - {first} if name != self.domain else ():
            for own in _STATISTICS:
                buffers, other = self._buffers, f"{own}_{exchanged}"
                buffers[own], buffers[other] = buffers[other], buffers[own]
        self.__dict__[ACTIVE] = name

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        before = self.domain
        self._use(name)
        try:
            yield
        finally:
            self._use(before)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._using(self.spec.names[0]):  # a key means the same domain, whichever is in use
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.spec.names[1:]:
            keys = {own: f"{prefix}{own}_{name}" for own in _STATISTICS}
            if not any(key in state_dict for key in keys.values()):  # a checkpoint from before this domain
                found = {
                    key: state_dict[prefix + own].clone() for own, key in keys.items() if prefix + own in state_dict
                }
                state_dict.update(found)
        with self._using(self.spec.names[0]):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DomainBatchNorm1d(_Domain, nn.BatchNorm1d):
    """Domain-specific batch normalization over (N, C) or (N, C, L); see [`bnkit.norms.Domain`][]."""


class DomainBatchNorm2d(_Domain, nn.BatchNorm2d):
    """Domain-specific batch normalization over (N, C, H, W); see [`bnkit.norms.Domain`][]."""


class DomainBatchNorm3d(_Domain, nn.BatchNorm3d):
    """Domain-specific batch normalization over (N, C, D, H, W); see [`bnkit.norms.Domain`][]."""


@dataclass(frozen=True)
class Domain(Spec):
    r"""Batch normalization with running statistics for each domain and one weight and bias for all.

    $$y = \gamma \frac{x - \mu_d}{\sqrt{\sigma_d^2 + \epsilon}} + \beta$$

    with mean and variance of the batch in training and of domain d's running statistics at inference. The domain is
    chosen by ``with bnkit.norms.domain(model, name):`` and is the first one otherwise. All start from the statistics
    that the layer has.

    The first domain's statistics have BatchNorm's own keys; the others' are extra buffers, ``running_mean_NAME``,
    ``running_var_NAME`` and ``num_batches_tracked_NAME``. A plain checkpoint loads, strictly, into every domain;
    [`bnkit.norms.plain_state_dict`][] gives one domain's checkpoint for plain BatchNorm. Undoing keeps the first
    domain's.

    Warning:
        A batch belongs to one domain: call the model once for each. With activation checkpointing the backward pass
        runs the forward again, so it must be inside the same context.

    Training: BatchNorm's own, and the statistics of the domain in use take a step.

    Inference: BatchNorm's own, by the domain in use.

    Source: Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020 (AdvProp's auxiliary batch norm);
    Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", CVPR 2019, section 3. Both
    have an affine map for each domain; here it is shared.

    Args:
        names: of the domains, at least one, each a Python identifier; the first is the default.
    """

    names: tuple[str, ...]

    layers = (DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d)
    needs_running_statistics = True

    def __post_init__(self) -> None:
        names: object = self.names
        if isinstance(names, str):
            raise ValueError(f"Domain's names are several, such as ({names!r}, 'other'), not one string.")
        object.__setattr__(self, "names", tuple(self.names))  # YAML has lists
        if not self.names or not all(isinstance(name, str) and name.isidentifier() for name in self.names):
            raise ValueError(f"Domain's names are one or more Python identifiers, not {self.names!r}.")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Domain's names are all different, not {self.names!r}.")

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """Add the other domains' statistics, as they are now for all."""
        for name in self.names[1:]:
            for own in _STATISTICS:
                buffer: Tensor | None = layer._buffers.get(own)
                layer.register_buffer(f"{own}_{name}", None if buffer is None else buffer.detach().clone())
        layer.__dict__[ACTIVE] = self.names[0]
        return {}

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:  # noqa: ARG002
        """Take the other domains' statistics away."""
        if isinstance(layer, _Domain):
            layer._use(self.names[0])
        for name in self.names[1:]:
            for own in _STATISTICS:
                del layer._buffers[f"{own}_{name}"]
        del layer.__dict__[ACTIVE]


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Let the model's [`bnkit.norms.Domain`][] layers use a domain's statistics for the time of the block.

    Blocks can be nested; leaving one, also by an exception, gives the domain of before back. Layers whose spec does not
    have the name keep theirs.

    Raises:
        ValueError: where no layer of the model has the domain.
    """
    layers = [module for module in model.modules() if isinstance(module, _Domain)]
    chosen = [(layer, layer.domain) for layer in layers if name in layer.spec.names]
    if not chosen:
        known = sorted({known for layer in layers for known in layer.spec.names})
        raise ValueError(f"No layer of the model has a domain {name!r}; there are: {', '.join(known) or 'none'}.")
    for layer, _ in chosen:
        layer._use(name)
    try:
        yield
    finally:
        for layer, before in chosen:
            if isinstance(layer, _Domain) and before in layer.spec.names:  # it may have been undone meanwhile
                layer._use(before)


def plain_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The model's state_dict with BatchNorm's keys alone, for the same model without [`bnkit.norms.Domain`][] layers.

    Args:
        model: the model.
        name: the domain whose statistics to take; None takes each layer's first.
    """
    state: dict[str, Any] = model.state_dict()
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _Domain):
            for other in layer.spec.names[1:]:
                for own in _STATISTICS:
                    start = f"{prefix}." if prefix else ""
                    value = state.pop(f"{start}{own}_{other}", None)
                    if other == name and value is not None:
                        state[start + own] = value
    return state
