"""Measures by how much training on idle ranks slows those that decode beside it."""
