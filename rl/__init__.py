"""The RL trainer and all that shapes its loss."""
