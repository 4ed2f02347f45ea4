"""Distils the drafter from what the engine has already computed."""
