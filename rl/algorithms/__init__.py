"""RL algorithms: one file a family, pure functions of rewards and log-probabilities."""
