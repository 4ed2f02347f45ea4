"""Problems, their prompts, the order in which they are chosen, and their scorers."""
