"""Collects what a run measures, logs it, and reports on it."""
