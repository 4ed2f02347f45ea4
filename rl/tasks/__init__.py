"""What a run asks: problems, their prompts, and the scorers of their answers."""
