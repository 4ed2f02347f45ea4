"""The drafter over a run: its first weights, its training on every rank, and the ranks' one drafter."""
