"""The chains and trees that a bandit chooses from unless it is told others."""

from __future__ import annotations

from paceline.rollout.strategy.strategy import Strategy

# A forward reads one token more than there are nodes. 8, 16 or 32 rows fill the tiles of matrix units, and
# one more row would start another tile.
_CHAIN_DEPTHS = (1, 2, 3, 4, 7)
# depth, width and nodes of each tree
_TREE_SHAPES = ((3, 3, 6), (4, 4, 7), (5, 4, 11), (6, 4, 15), (8, 4, 23), (10, 4, 31))


def default_arms(name: str, max_nodes: int, chains_only: bool = False) -> list[Strategy]:
    """Returns the default chains and trees of a drafter, of at most ``max_nodes`` draft tokens.

    Args:
        name: Name of the drafter.
        max_nodes: Maximum number of draft tokens per sequence.
        chains_only: Whether the drafter drafts nothing but chains.
    """
    chains = [Strategy(name, d) for d in _CHAIN_DEPTHS if d <= max_nodes]
    return (
        chains
        if chains_only
        else chains + [Strategy(name, d, w, n) for d, w, n in _TREE_SHAPES if n <= max_nodes]
    )
