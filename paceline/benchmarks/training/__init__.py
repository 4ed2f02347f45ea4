"""Benchmarks of training: the update, drafter training, sharding, learning curves, and TRL's trainer."""
