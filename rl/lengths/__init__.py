"""How long completions are, and how long they will be."""
