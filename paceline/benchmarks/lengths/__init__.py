"""Studies of lengths: length-aware rewards, predicted lengths, and the long tail."""
