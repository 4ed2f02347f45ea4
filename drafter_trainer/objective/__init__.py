"""What the drafter is trained for: losses over several draft positions, and the attention of drafts."""
