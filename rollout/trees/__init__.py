"""Which tokens to verify: the draft tree and the ways to build one."""

from rollout.trees.chain import DraftTree, chain_parents

__all__ = ["DraftTree", "chain_parents"]
