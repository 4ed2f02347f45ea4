"""Implements the commands of `paceline` and of the scripts in launch/, one function per command."""
