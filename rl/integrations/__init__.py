"""Provides rollouts and rewards to other trainers; each trainer's imports stay in a file of their own."""
