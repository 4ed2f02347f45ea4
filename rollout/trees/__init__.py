"""Which tokens to verify: the draft tree and the ways to build one."""

from paceline.rollout.trees.draft_tree import (
    MAX_NODES,
    DraftKind,
    DraftTree,
    chain_parents,
    child_table,
    draft_mass,
    no_draft,
    tree_shape,
)

__all__ = [
    "MAX_NODES",
    "DraftKind",
    "DraftTree",
    "chain_parents",
    "child_table",
    "draft_mass",
    "no_draft",
    "tree_shape",
]
