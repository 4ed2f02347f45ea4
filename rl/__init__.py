"""The RL trainer: its loop, algorithms, rewards, recipes and integrations."""
