"""Studies of decoding: drafters, verifiers, the bandit, and what a GPU makes of them."""
