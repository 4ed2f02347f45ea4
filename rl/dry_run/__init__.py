"""What a recipe will take and whether it runs, found out before anything is trained."""
