"""What a swap made of each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms import Spec, undo

__all__ = ["Conversion", "LayerConversion"]


@dataclass(frozen=True)
class LayerConversion:
    """What a swap made, or in a dry run would make, of one layer.

    Attributes:
        layer_class: the name of the class that reverting gives back.
        before: the spec that it had; None for plain BatchNorm.
        after: the spec that it has; None for plain BatchNorm.
        pattern: the pattern of the rule that it fell under; None where there is none.
        rule: what that rule says; None leaves the layer alone.
        note: what is to be known beside this; mostly empty.
    """

    layer_class: str
    before: Spec | None
    after: Spec | None
    pattern: str | None = None
    rule: Spec | None = None
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the layer became something else."""
        return self.before != self.after


@dataclass(frozen=True)
class Conversion:
    """The result of [`bnkit.swap`][].

    Attributes:
        layers: every BatchNorm layer of the model, by qualified name, in the model's order.
        plans: a line for each ``NormBatch`` among the rules: what it resolved to, and why.
        dry_run: whether nothing was changed.
    """

    layers: dict[str, LayerConversion]
    plans: tuple[str, ...]
    dry_run: bool
    _modules: dict[str, _BatchNorm] = field(repr=False, compare=False)

    def revert(self) -> list[str]:
        """Give the layers that this swap was for their original classes back, as [`bnkit.revert`][] does.

        A layer that was a variant before the swap becomes what it was before its first swap. After a dry run there is
        nothing to revert.

        Returns:
            The names of the layers that were given back.
        """
        if self.dry_run:
            return []
        return [name for name, layer in self._modules.items() if self.layers[name].rule is not None and undo(layer)]

    def table(self) -> str:
        """A plain-text table: a line a layer in the model's order, then the plans, and a closing line."""
        rows = [("layer", "from", "to", "rule")]
        for name, layer in self.layers.items():
            before = layer.layer_class if layer.before is None else str(layer.before)
            after = layer.layer_class if layer.after is None else str(layer.after)
            rule = "none matches" if layer.pattern is None else f"{layer.pattern}: {layer.rule or 'left alone'}"
            rows.append((name, before, after if layer.changed else "the same", f"{rule} {layer.note}".rstrip()))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        changed = sum(layer.changed for layer in self.layers.values())
        closing = f"{changed} of {len(self.layers)} layers {'would be' if self.dry_run else 'were'} swapped"
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *self.plans, closing])
