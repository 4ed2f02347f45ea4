"""Forwards of the policy as the engine runs them: its cache, its attention, fused layers and captured
graphs.
"""
