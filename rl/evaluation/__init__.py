"""Evaluates a policy on problems that it is not trained on."""
