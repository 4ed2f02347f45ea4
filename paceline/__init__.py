"""Paceline: lossless, adaptive speculative rollouts for reasoning RL, with a drafter distilled on the way."""
