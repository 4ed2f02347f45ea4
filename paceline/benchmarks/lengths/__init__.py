"""Benchmarks of completion lengths: length-aware rewards, length prediction, and the long tail."""
