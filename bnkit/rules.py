"""Rules: which layer gets which spec, by patterns on the layers' names."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple

from bnkit import norms
from bnkit.norms import Spec

__all__ = ["Match", "Rules", "as_patterns", "match", "parse_rules", "unused"]

Rules = Spec | Mapping[str, Spec | None]
"""One spec for all layers, or specs by pattern; None leaves a layer alone."""


class Match(NamedTuple):
    """The rule that a layer falls under."""

    pattern: str
    spec: Spec | None


def as_patterns(rules: Rules) -> dict[str, Spec | None]:
    """The rules as a dict from pattern to spec, in order.

    Raises:
        TypeError: for anything but a spec or a mapping from strings to specs and None.
    """
    if isinstance(rules, Spec):
        return {"*": rules}
    if not isinstance(rules, Mapping):
        raise TypeError(f"Rules are one spec, or a dict from pattern to spec or None, not {_shown(rules)}.")
    for pattern, spec in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"A rule's pattern is a string, such as 'layer4.*', not {pattern!r}.")
        if spec is not None and not isinstance(spec, Spec):
            raise TypeError(
                f"The rule for {pattern!r} is a spec such as bnkit.norms.Ghost(16), or None, not {_shown(spec)}."
            )
    return dict(rules)


def match(rules: Rules, names: Iterable[str]) -> dict[str, Match]:
    """The first rule whose pattern fits, for each of the names that have one."""
    patterns = as_patterns(rules)
    found: dict[str, Match] = {}
    for name in names:
        for pattern, spec in patterns.items():
            if fnmatchcase(name, pattern):
                found[name] = Match(pattern, spec)
                break
    return found


def unused(rules: Rules, names: Iterable[str]) -> list[str]:
    """What to tell the user about each pattern that no name falls under."""
    names = list(names)
    used = {rule.pattern for rule in match(rules, names).values()}
    return [_why_unused(pattern, names) for pattern in as_patterns(rules) if pattern not in used]


def _why_unused(pattern: str, names: list[str]) -> str:
    if not names:
        return f"The rule for {pattern!r} has nothing to do: the model has no BatchNorm layers."
    shadowed = [name for name in names if fnmatchcase(name, pattern)]
    if shadowed:
        return f"The rule for {pattern!r} is never reached: rules before it take {shadowed[0]!r} and all others."
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return f"The rule for {pattern!r} matches no BatchNorm layer. Names near it: {', '.join(map(repr, near))}."


def parse_rules(value: Any) -> dict[str, Spec | None] | None:
    """Rules from what a config file can say.

    A spec is an instance, a string such as ``"Ghost(16)"`` (what its ``repr`` gives), or a dict with ``_target_``
    (Hydra) or ``class_path`` and ``init_args`` (jsonargparse). Rules are one of these or a dict of these by pattern.
    None gives None.

    Raises:
        TypeError, ValueError: for anything else.
    """
    value = _without_omegaconf(value)
    if value is None or (isinstance(value, str) and value.strip() in ("None", "null")):
        return None
    if isinstance(value, Mapping) and not _is_spec(value):
        return as_patterns({pattern: _parse_spec(spec) for pattern, spec in value.items()})
    return as_patterns(_parse_spec(value))


def _without_omegaconf(value: Any) -> Any:
    """Hydra builds a dict, without ``_convert_``, as one of its own kind, in which a spec is a config of its fields."""
    omegaconf: Any = sys.modules.get("omegaconf")  # where it was not imported, nothing is of its making
    return omegaconf.OmegaConf.to_object(value) if omegaconf and omegaconf.OmegaConf.is_config(value) else value


def _is_spec(value: Mapping[Any, Any]) -> bool:
    return "_target_" in value or "class_path" in value


def _parse_spec(value: Any) -> Any:
    if isinstance(value, str):
        return _parse_call(value)
    if isinstance(value, Mapping) and "_target_" in value:
        return _make(value["_target_"], [], {key: v for key, v in value.items() if not key.startswith("_")})
    if isinstance(value, Mapping) and "class_path" in value:
        return _make(value["class_path"], [], dict(value.get("init_args") or {}))
    return value


def _parse_call(text: str) -> Spec | None:
    """``"Ghost(16)"``, ``"Frozen"`` or ``"None"``; arguments are literals, nothing is evaluated."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        arguments = [ast.literal_eval(argument) for argument in call.args]
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a spec: write it as in 'Ghost(16)' or 'Frozen(affine=False)'.") from error
    return _make(name, arguments, options)


def _make(name: str, arguments: list[Any], options: dict[str, Any]) -> Spec:
    module, _, last = name.rpartition(".")
    try:
        cls = getattr(import_module(module) if module else norms, last, None)
    except ImportError:
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, Spec) and cls is not Spec):
        known = [name for name in norms.__all__ if isinstance(vars(norms)[name], type)]
        known = [name for name in known if issubclass(vars(norms)[name], Spec) and name != "Spec"]
        raise ValueError(f"{name!r} is not a spec; there are {', '.join(known)}.")
    spec: Spec = cls(*arguments, **options)
    return spec


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)
