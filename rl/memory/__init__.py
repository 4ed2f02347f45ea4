"""What a recipe takes of a device's memory, by part, before anything is loaded."""
