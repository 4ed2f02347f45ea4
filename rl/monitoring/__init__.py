"""What a run measures, and what it tells of it."""
