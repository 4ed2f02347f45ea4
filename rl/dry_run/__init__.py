"""Checks a recipe without training: estimates memory and time, and tries a few tiny steps."""
