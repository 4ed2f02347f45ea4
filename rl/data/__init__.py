"""Reads data sets of prompts and answers: files, formats of rows, and a survey of all rows."""
