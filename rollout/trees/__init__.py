"""Which tokens to verify: the draft tree and the ways to build one."""

from rollout.trees.draft_tree import MOST_NODES, DraftTree, chain_parents, child_table, no_draft, tree_shape

__all__ = ["MOST_NODES", "DraftTree", "chain_parents", "child_table", "no_draft", "tree_shape"]
