"""Data sets of prompts and answers: their files, the shapes of their rows, and what is known of all of
them.
"""
