"""What `paceline` and the scripts in launch/ do: one function a command, its parameters its options."""
