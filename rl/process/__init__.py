"""What every process of a run needs: its files, its end, its threads, and how it speaks."""
