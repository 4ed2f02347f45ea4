"""Storage of drafters, optimizer states and checksums, and export to directories that servers load."""
