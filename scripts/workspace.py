"""Create the W&B workspace for what bnkit logs, or write it to a JSON file offline.

Usage::

    python scripts/workspace.py project=bnkit entity=ME           # create it and print its URL
    python scripts/workspace.py output=workspace.json             # write it: no network, no key
    python scripts/workspace.py output=workspace.json run=RUN_DIR # only what that run logged, a line for each layer
    python scripts/workspace.py --help                            # every value
"""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig

from bnkit.dashboard.workspace import make

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="workspace")
def main(cfg: DictConfig) -> None:
    """Create or write the workspace."""
    log.info("Workspace: %s", make(**cfg))


if __name__ == "__main__":
    main()
