"""Captured forwards: which shapes to capture, and the pool that replays them."""
