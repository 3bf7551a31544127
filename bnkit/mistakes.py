"""A user's mistake is told by the commands in a sentence, without a traceback.

Quick to import, since every command waits for it before it shows its ``--help``.
"""

from __future__ import annotations

import functools
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import MissingMandatoryValue

from bnkit.resolvers import command

__all__ = ["Mistake", "names_missing_plugins", "told_plainly"]

P = ParamSpec("P")
R = TypeVar("R")

_PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "optuna": "hydra_optuna_sweeper",
    "norm_batch_optuna": "hydra_optuna_sweeper",
}
"""The package within ``hydra_plugins`` that an option needs."""


class Mistake(CompactHydraException):
    """What the user has to change, in a sentence. Hydra shows it without a traceback, and exits with code 1."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Within a command: an error that bnkit raises on purpose becomes a ``Mistake`` of the same text.

    So do a value that is missing (``ckpt: ???``), and what Lightning calls a misconfiguration. Other errors go on as
    they are, with their traceback; ``HYDRA_FULL_ERROR=1`` shows that of any.

    Raises:
        Mistake: in place of those errors.
    """
    try:
        yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        # Without "from": of a cause that is OmegaConf's Hydra would show the text too, and a traceback has the context.
        raise Mistake(sentence)  # noqa: B904


def _sentence(error: Exception) -> str | None:
    """What to tell of the error; None where it is no mistake of the user, as far as can be known."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}= is missing; {command()} --help says what it is."
    if isinstance(error, InstantiationException):
        full_key = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE)
        where = full_key[1] if full_key else "a _target_"
        if str(error).startswith("Error locating target"):
            target = re.search(r"target '(.+?)'", str(error))
            return (
                f"{where}._target_={target[1] if target else ''} cannot be imported; install its package, or put its "
                f"folder on PYTHONPATH (HYDRA_FULL_ERROR=1 says what went wrong)."
            )
        cause = error.__cause__
        if not isinstance(cause, Exception) or not _on_purpose(cause):
            return None
        return str(cause) if str(cause).startswith(where) else f"{where}: {cause}"
    return str(error) if _on_purpose(error) else None


def _on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` of bnkit's raised it, not a call that went wrong; or Lightning, as a misconfiguration."""
    if any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__):
        return True
    trace = error.__traceback__
    if trace is None or isinstance(error, AssertionError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    ours = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "bnkit"
    return ours and linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip().startswith("raise ")


def names_missing_plugins(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a Hydra app: a launcher or sweeper that is not installed is told with the extra that brings it.

    Hydra looks for it before the app begins, and would name what there is instead.
    """

    @functools.wraps(main)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for argument in sys.argv[1:]:
            group, _, option = argument.partition("=")
            if group not in ("launcher", "hparams_search", "hydra/launcher", "hydra/sweeper"):
                continue
            if option in _PLUGINS and not _installed(_PLUGINS[option]):
                sys.exit(f'{argument} needs a plugin of Hydra that is not installed: pip install "bnkit[sweeps]"')
        return main(*args, **kwargs)

    return checked


def _installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # there is no plugin at all
        return False
