"""Studies of training: the update, the drafter's training, sharding, and whole runs."""
