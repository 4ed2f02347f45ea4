"""Benchmarks of the project, one module each; `paceline.benchmarks.main` lists and runs them."""
