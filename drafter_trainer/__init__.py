"""Trains the draft model on the hidden states that the rollout engine has already computed."""
