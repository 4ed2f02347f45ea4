"""Checks that a recipe's values make sense together, a file for each section."""
