"""RL algorithms as pure functions of rewards and log-probs, one file for each family.

`advantages.ADVANTAGES` and `policy_losses.POLICY_LOSSES` register what a recipe may select by name.
"""
