"""Task rewards, the processes that compute them, and length-aware reward terms."""
