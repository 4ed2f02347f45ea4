"""The engine: schedules requests onto slots, drafts, verifies and commits tokens, and returns rollouts."""
