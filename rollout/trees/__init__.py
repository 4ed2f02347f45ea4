"""Draft trees: the tokens that one target forward verifies, and the algorithms that build them."""

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
