"""The commands: thin Hydra entry points, installed as ``bnkit-train`` and so on. Nothing here is worth importing."""
