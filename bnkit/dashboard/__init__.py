"""Where a run is seen: the names of what is logged, W&B's panels and workspace, and the page."""
