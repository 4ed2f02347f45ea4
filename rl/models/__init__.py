"""Finds, checks, loads, adapts and publishes policies."""
