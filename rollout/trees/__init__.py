"""Which tokens to verify: the draft tree and the ways to build one."""

from paceline.rollout.trees.draft_tree import (
    MOST_NODES,
    DraftKind,
    DraftTree,
    chain_parents,
    child_table,
    draft_mass,
    no_draft,
    tree_shape,
)

__all__ = [
    "MOST_NODES",
    "DraftKind",
    "DraftTree",
    "chain_parents",
    "child_table",
    "draft_mass",
    "no_draft",
    "tree_shape",
]
