"""The engine: which requests hold slots, what is drafted and verified in a step, and what is handed back."""
