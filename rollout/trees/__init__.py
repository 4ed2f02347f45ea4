"""Draft trees: the tokens that one target forward verifies, and the algorithms that build them.

A new tree is one file, which defines a `TreeBuilder`, and one line in `TREES`.
"""

from paceline.rollout.trees.builder import TreeBuilder, TreeOptions
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
from paceline.rollout.trees.ranked import DYNAMIC, OPT_TREE
from paceline.rollout.trees.sampled import DYSPEC, STATIC

TREES: dict[str, TreeBuilder] = {
    "dynamic": DYNAMIC,
    "opt_tree": OPT_TREE,
    "dyspec": DYSPEC,
    "static": STATIC,
}

__all__ = [
    "MAX_NODES",
    "TREES",
    "DraftKind",
    "DraftTree",
    "TreeBuilder",
    "TreeOptions",
    "chain_parents",
    "child_table",
    "draft_mass",
    "no_draft",
    "tree_shape",
]
