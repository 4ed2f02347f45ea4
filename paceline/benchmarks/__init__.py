"""Benchmarks: ``paceline bench`` runs them, benchmarks/ keeps their results."""
