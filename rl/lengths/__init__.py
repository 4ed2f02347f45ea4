"""Statistics and predictions of completion lengths."""
