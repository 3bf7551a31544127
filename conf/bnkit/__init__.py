"""The groups that any Hydra app can compose; a package, so that the reference job can give them short names."""
