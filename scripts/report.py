"""Show a run as one page, report.html, which opens without a network.

Usage::

    bnkit-report run=RUN_DIR                      # RUN_DIR/report.html
    bnkit-report run=RUN_DIR/csv/metrics.csv output=report.html
    bnkit-report run=RUN_DIR/wandb/offline-run-…  # a run of W&B that was not sent
    bnkit-report --help                           # every value

Or ``python scripts/report.py``, which needs no installed command.
"""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from bnkit.mistakes import told_plainly


@hydra.main(version_base="1.3", config_path="pkg://bnkit.conf", config_name="report")
def main(cfg: DictConfig) -> None:
    """Write the page."""
    with told_plainly():
        from bnkit.dashboard.report import FILE_NAME, write_report  # only now: --help need not wait for Plotly
        from bnkit.dashboard.sources import read

        run = Path(cfg.run)
        output = Path(cfg.output) if cfg.output is not None else (run if run.is_dir() else run.parent) / FILE_NAME
        logging.getLogger(__name__).info("Report: %s", write_report(read(run), output))


if __name__ == "__main__":
    main()
