import hydra
from omegaconf import DictConfig


def instantiate_all(group: DictConfig | None) -> list:
    """Everything in the group that has a ``_target_``, in the config's order."""
    entries = (group or {}).values()
    return [
        hydra.utils.instantiate(entry) for entry in entries if isinstance(entry, DictConfig) and "_target_" in entry
    ]
