"""Policies: found, checked, loaded, adapted and published."""
