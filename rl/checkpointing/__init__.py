"""Saves checkpoints, resumes runs from them, and keeps a run's directory consistent."""
