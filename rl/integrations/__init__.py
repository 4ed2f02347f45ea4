"""Rollouts and rewards for trainers that are not ours; each pipeline's imports stay in its own file."""
