"""A step's rollouts: whole, in segments, as trees, cut at budgets, or by vLLM."""
