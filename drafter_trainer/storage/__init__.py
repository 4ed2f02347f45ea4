"""The drafter, its optimizer and its checksums on disk, and directories that others serve."""
