"""Checks and measurements on one GPU."""
