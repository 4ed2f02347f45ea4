"""Handles what every process of a run needs: files, locks, threads, console output and shutdown."""
