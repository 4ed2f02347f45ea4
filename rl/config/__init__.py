"""The typed recipe, a file for each YAML section, and the parser that fills it; none of them loads torch."""
