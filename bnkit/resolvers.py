"""What the configs of bnkit can ask for: ``${bnkit.NAME:}``. ``bnkit.conf`` registers them.

Quick to import, since every command waits for it before it shows its ``--help``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from omegaconf import OmegaConf

__all__ = ["command", "conf_folder", "register", "started"]


@functools.cache
def started() -> str:
    """When the job began, for the name of its directory: the same text in all processes that torchrun or SLURM started.

    In a config, ``${bnkit.started:}``. Each process by itself would take its own clock's second.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return f"slurm_{os.environ['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return now
    import torch.distributed as dist

    # The store through which torchrun's agent lets the processes find each other is there before any of them.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    key = f"bnkit/started/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if os.environ["RANK"] == "0":
        store.set(key, now)
    return str(store.get(key).decode())


def command() -> str:
    """How this program was called, as the user would type it again; in a config, ``${bnkit.command:}``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name}"
    program = Path(sys.argv[0])
    return f"python {program}" if program.suffix == ".py" else program.name


def conf_folder() -> str:
    """Where the configs are, each value with its comment; in a config, ``${bnkit.conf_folder:}``."""
    return str(files("bnkit.conf"))


def register() -> None:
    """Register the resolvers, once."""
    resolvers: dict[str, Callable[[], str]] = {"started": started, "command": command, "conf_folder": conf_folder}
    for name, resolver in resolvers.items():
        if not OmegaConf.has_resolver(f"bnkit.{name}"):
            # Kept with the config, which goes to the processes of joblib and submitit: they are in the sweep's
            # directory too.
            OmegaConf.register_new_resolver(f"bnkit.{name}", resolver, use_cache=True)
