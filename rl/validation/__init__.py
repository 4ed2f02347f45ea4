"""Which values of a recipe contradict each other."""
