"""The configs of bnkit: groups for any Hydra app under ``bnkit/``, and the reference job's own."""

from bnkit.resolvers import register

register()
