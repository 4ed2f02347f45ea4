"""A run on disk: its directory, its lock, whole checkpoints, and going on from one."""
