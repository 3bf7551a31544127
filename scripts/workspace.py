"""Create the W&B workspace for what bnkit logs, or write it to a JSON file offline.

Usage::

    bnkit-workspace project=bnkit entity=ME           # create it and print its URL
    bnkit-workspace output=workspace.json             # write it: no network, no key
    bnkit-workspace output=workspace.json run=RUN_DIR # only what that run logged, a line for each layer
    bnkit-workspace --help                            # every value

Or ``python scripts/workspace.py``, which needs no installed command.
"""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="workspace")
def main(cfg: DictConfig) -> None:
    """Create or write the workspace."""
    with told_plainly():
        from bnkit.dashboard.workspace import make  # only now: --help need not wait for W&B

        logging.getLogger(__name__).info("Workspace: %s", make(**cfg))


if __name__ == "__main__":
    main()
